# SPDX-License-Identifier: Apache-2.0
"""Tensors that travel together: what drafting and verification take and return.

Every implementation of a kernel takes the same tuples; the Numba versions take them with NumPy
arrays as fields.
"""

from functools import partial
from typing import NamedTuple

import torch


class TreeTables(NamedTuple):
    """Trees whose nodes are numbered breadth-first; node 0 is the root. A static tree has the
    tables [num_tree_nodes], where each request has a tree of its own they are [max_num_reqs,
    num_tree_nodes]."""

    # [num_tree_nodes] or [max_num_reqs, num_tree_nodes] int32: id of each node's first child; 0 at
    # leaves of static trees, and of others where it would be
    first_child: torch.Tensor
    # as `first_child`: 0 to MAX_CHILDREN
    num_children: torch.Tensor
    # [num_tree_nodes] int32: row of each node that may have children in the draft's tensors; -1 of
    # others
    internal_index: torch.Tensor
    # as `first_child`: id of each node's parent; 0 for the root
    parents: torch.Tensor

    @property
    def num_nodes(self) -> int:
        """The number of nodes, with the root."""
        return self.internal_index.shape[0]

    @property
    def request_stride(self) -> int:
        """By how much a request's entries are after those of the request before it; 0 if all
        requests share them."""
        return self.first_child.stride(0) if self.first_child.dim() > 1 else 0

    def of(
        self,
        # [num_reqs] int64
        req_idx: torch.Tensor,
    ) -> "TreeTables":
        """The tables of some requests. [num_reqs, num_tree_nodes] each but `internal_index`"""

        def rows(table: torch.Tensor) -> torch.Tensor:
            return table[req_idx] if table.dim() > 1 else table.expand(len(req_idx), -1)

        return TreeTables(
            rows(self.first_child),
            rows(self.num_children),
            self.internal_index,
            rows(self.parents),
        )

    def to(self, device: torch.device | str) -> "TreeTables":
        return TreeTables(*(table.to(device) for table in self))


class GrownTrees(NamedTuple):
    """Trees that are decided level by level, one for each request; written while they are."""

    # [max_num_reqs, num_tree_nodes] each but `internal_index`
    tables: TreeTables
    # [max_num_reqs, num_tree_nodes] int64: each node's ancestors and itself, bit i is node i
    ancestor_masks: torch.Tensor
    # [max_num_reqs, num_tree_nodes] float32: how likely a node is expected to be accepted, 1 for
    # the root
    reach: torch.Tensor


class Requests(NamedTuple):
    """Whose rows these are, and what the requests draw with. n is the number of requests, or of
    rows where a request has several."""

    # [n] integer: index into the two tensors of request states below; -1 leaves a row undrafted
    req_idx: torch.Tensor
    # [n] int64: position of the tree's root in its sequence
    root_positions: torch.Tensor
    # [max_num_reqs] float32: what children are drafted with; 0 is greedy
    temperature: torch.Tensor
    # [max_num_reqs] int64
    seeds: torch.Tensor

    def rows(
        self,
        # [num_rows] int64
        requests: torch.Tensor,
    ) -> "Requests":
        """The same with a row for each of the requests given by their place in the batch."""
        return self._replace(
            req_idx=self.req_idx[requests], root_positions=self.root_positions[requests]
        )


class Children(NamedTuple):
    """What was drafted, a row for each parent."""

    # [num_rows, max_children] int64: -1 past a row's last child and in undrafted rows
    tokens: torch.Tensor
    # [num_rows] int32: bit s says that the child in slot s was drawn; the others are hubs
    sampled: torch.Tensor


class KeptRows(NamedTuple):
    """Where drafting keeps the rows that it has drawn from, for verification. It does not keep
    those of greedy requests, which verification does not read."""

    # [max_num_reqs, num_internal, vocab_size] of the rows' dtype, last dimension contiguous
    logits: torch.Tensor
    # [num_rows] int32: where each row is kept among its request's
    internal: torch.Tensor


class Drafts(NamedTuple):
    """What verification must know of how request states drafted their trees."""

    # [max_num_reqs, num_internal, vocab_size] any float dtype: the logits that each internal node's
    # children were drafted from, before temperature; last dimension contiguous
    logits: torch.Tensor
    # [max_num_reqs, num_internal] int32: of each internal node, bit s says that the child in slot s
    # was drawn; the others are hubs
    sampled: torch.Tensor


class TargetRows(NamedTuple):
    """The target's view of the drafted nodes: one row for each node of each request."""

    # [num_rows, vocab_size] any float dtype: request r's row of a node is `row_start[r] + node`;
    # -inf for masked tokens; last dimension contiguous
    logits: torch.Tensor
    # [max_num_reqs] float32: what `logits` must still be divided by; 0 is greedy
    temperature: torch.Tensor
    # [num_reqs] int32: each request's first row, its root's
    row_start: torch.Tensor
    # [num_reqs] int32: drafted nodes verified per request, 0..num_tree_nodes - 1
    num_nodes: torch.Tensor
    # [num_rows] integer: the token of each row's node; the roots' are not read
    node_tokens: torch.Tensor
    # [num_rows] int64: the token that plain decoding draws from each row, for rules that read it
    drawn: torch.Tensor | None = None


class VerifiedPaths(NamedTuple):
    """What verification emits for every request."""

    # [num_reqs, max_depth + 1] int64: accepted tokens, then the residual or bonus token, then -1
    tokens: torch.Tensor
    # [num_reqs] int32: accepted tokens plus one
    num_emitted: torch.Tensor
    # [num_reqs, max_depth + 1] int32: the accepted node at each depth, from the root's 0; -1 past
    # the last accepted one
    path: torch.Tensor

    def padded(self, width: int) -> "VerifiedPaths":
        """The same in `width` columns."""
        missing = (0, width - self.path.shape[1])
        pad = partial(torch.nn.functional.pad, pad=missing, value=-1)
        return VerifiedPaths(pad(self.tokens), self.num_emitted, pad(self.path))

    def where(
        self,
        # [num_reqs] bool
        chosen: torch.Tensor,
        other: "VerifiedPaths",
    ) -> "VerifiedPaths":
        """These for the chosen requests, the other's for the rest."""
        columns = chosen.unsqueeze(1)
        return VerifiedPaths(
            torch.where(columns, self.tokens, other.tokens),
            torch.where(chosen, self.num_emitted, other.num_emitted),
            torch.where(columns, self.path, other.path),
        )
