# SPDX-License-Identifier: Apache-2.0
"""`DraftBuffers`, `DraftState`: what verification must know of how a tree was drawn."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels.arguments import Children, Drafts, TreeTables


class LevelRows(NamedTuple):
    """A level's nodes in a batch: a row for each node of each request, a request's side by side."""

    # [num_rows] int64, the row's request, by its place in the batch
    req: torch.Tensor
    # [num_rows] int32
    nodes: torch.Tensor
    # [num_rows] int32
    num_children: torch.Tensor
    # [num_rows] int64, where the node's token is among the request's
    column: torch.Tensor
    # [num_rows] int32, where the node's draft row is among the request's
    internal: torch.Tensor
    # [num_rows] int64, the row of the node's parent in the level above; 0 for roots
    parent_rows: torch.Tensor
    # [num_rows] int64, bit i stands for tree node i
    ancestor_masks: torch.Tensor


@dataclass(frozen=True)
class DraftLevel:
    """The internal nodes of one depth: what one draft pass expands."""

    # [num_expanded] int32 each, on the host
    nodes_np: np.ndarray
    num_children_np: np.ndarray
    max_children: int
    # [num_expanded] each: int32; int64, where the node's token is among the request's; int64
    nodes: torch.Tensor
    columns: torch.Tensor
    depths: torch.Tensor
    # breadth-first numbering makes both contiguous
    internal: slice
    children: slice
    # [num_children_in_all] int64, where the children are in a [num_expanded * max_children] row;
    # None where all nodes have as many
    select: torch.Tensor | None
    # of as many requests as there may be
    all_rows: LevelRows
    # [most_requests + 1] int32, each request's first row, on the device and on the host
    starts: torch.Tensor
    starts_np: np.ndarray
    _rows: dict[int, LevelRows] = field(default_factory=dict)

    def rows(self, num_reqs: int) -> LevelRows:
        """Those of a batch of so many requests."""
        if num_reqs not in self._rows:
            count = num_reqs * len(self.nodes_np)
            self._rows[num_reqs] = LevelRows(*(table[:count] for table in self.all_rows))
        return self._rows[num_reqs]


class DraftBuffers:
    """What requests have drafted, for each of several trees.

    Args:
        most_requests: by tree, how many requests' drafts there is room for, beside a last row that
            is nobody's. Where it is `max_num_reqs`, a request's drafts stand in its own row, else
            in a row that it is given.
        max_num_reqs: request-state slots.
        vocab_size: width of a draft row.
        dtype: of the draft logits.
        device: where the buffers live.
        point_masses: no child is ever drawn, so nothing need be remembered of a draft's logits.
    """

    def __init__(
        self,
        most_requests: Mapping[TokenTree, int],
        max_num_reqs: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
        point_masses: bool = False,
    ) -> None:
        self.states = [
            DraftState.empty(
                tree,
                most + 1,
                vocab_size,
                dtype,
                device,
                given=most < max_num_reqs,
                point_masses=point_masses,
            )
            for tree, most in most_requests.items()
        ]
        self.num_nodes = max(state.tree.num_nodes for state in self.states)

    @property
    def num_bytes(self) -> int:
        """The bytes of all rows."""
        tensors = [tensor for state in self.states for tensor in (state.tokens, *state.drafts)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


class DraftRows(NamedTuple):
    """What rules read of a request by its row, where rows are given to requests."""

    # [num_rows] float32
    temperature: torch.Tensor
    # [num_rows] int64
    seeds: torch.Tensor


class DraftState:
    """Per-request drafts of a static tree, and the tree's tables on the device.

    Args:
        tree: the tree that was drafted.
        tokens: int64, node i in column i - 1.
        drafts: how they were drafted.
        rows: if rows are given to requests, of which the last one is nobody's; None if a row is
            that of the request's state.
    """

    def __init__(
        self,
        tree: TokenTree,
        # [num_rows, num_nodes]
        tokens: torch.Tensor,
        drafts: Drafts,
        rows: DraftRows | None = None,
    ) -> None:
        def table(array: np.ndarray) -> torch.Tensor:
            return torch.tensor(array, device=tokens.device)

        self.tree, self.tokens, self.drafts, self.rows = tree, tokens, drafts, rows
        self.tables = TreeTables(
            table(tree.first_child),
            table(tree.num_children),
            table(tree.internal_index),
            table(np.array([0, *tree.parents], dtype=np.int32)),
        )
        levels = tree.internal_levels()
        self.levels = [
            self._level(nodes, above, table)
            for nodes, above in zip(levels, [levels[0], *levels], strict=False)
        ]

    @classmethod
    def empty(
        cls,
        tree: TokenTree,
        num_rows: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
        given: bool = False,
        point_masses: bool = False,
    ) -> "DraftState":
        """With room for the drafts of so many requests.

        Args:
            given: whether rows are given to requests. The last one is then nobody's.
            dtype: of the draft logits, kept as the draft model gave them: what is verified must be
                what was drawn.
            point_masses: no child is ever drawn, so all requests share one row of logits.
        """
        num_internal = len(tree.internal_nodes)
        rows = None
        if given:
            rows = DraftRows(
                torch.zeros(num_rows, device=device),
                torch.zeros(num_rows, dtype=torch.int64, device=device),
            )
        # [num_rows, num_internal, vocab_size], truncated, before temperature; only nodes with
        # children have a distribution to remember
        logits = torch.zeros(
            1 if point_masses else num_rows, num_internal, vocab_size, dtype=dtype, device=device
        ).expand(num_rows, -1, -1)
        # [num_rows, num_internal], bit s for a child in slot s that was drawn
        sampled = torch.zeros(num_rows, num_internal, dtype=torch.int32, device=device)
        return cls(
            tree,
            torch.zeros(num_rows, tree.num_nodes, dtype=torch.int64, device=device),
            Drafts(logits, sampled),
            rows,
        )

    def _level(self, nodes: np.ndarray, above: np.ndarray, table) -> DraftLevel:
        tree = self.tree
        parents = np.searchsorted(above, np.array([0, *tree.parents])[nodes])
        counts = tree.num_children[nodes]
        max_children = int(counts.max())
        first_internal = int(tree.internal_index[nodes[0]])
        first_child = int(tree.first_child[nodes[0]])
        has_child = np.arange(max_children) < counts[:, None]
        max_num_reqs = len(self.tokens)
        starts = np.arange(max_num_reqs + 1, dtype=np.int32) * len(nodes)
        parent_rows = np.arange(max_num_reqs)[:, None] * len(above) + parents
        return DraftLevel(
            nodes_np=nodes,
            num_children_np=counts,
            max_children=max_children,
            nodes=table(nodes),
            columns=table(nodes.astype(np.int64) - 1),
            depths=table(tree.depths[nodes].astype(np.int64)),
            internal=slice(first_internal, first_internal + len(nodes)),
            children=slice(first_child - 1, first_child - 1 + int(counts.sum())),
            select=None if has_child.all() else table(np.flatnonzero(has_child)),
            all_rows=LevelRows(
                req=table(np.arange(max_num_reqs).repeat(len(nodes))),
                nodes=table(np.tile(nodes, max_num_reqs)),
                num_children=table(np.tile(counts, max_num_reqs)),
                column=table(np.tile(nodes.astype(np.int64) - 1, max_num_reqs)),
                internal=table(np.tile(tree.internal_index[nodes].astype(np.int32), max_num_reqs)),
                parent_rows=table(parent_rows.ravel()),
                ancestor_masks=table(np.tile(tree.ancestor_masks[nodes], max_num_reqs)),
            ),
            starts=table(starts),
            starts_np=starts,
        )

    def write_children(
        self,
        level: DraftLevel,
        # [num_reqs] int64
        idx_mapping: torch.Tensor,
        # [num_reqs * num_expanded, vocab_size]
        logits: torch.Tensor,
        # of the same rows
        children: Children,
    ) -> None:
        """Store the children of one level's nodes, and the rows that they were drawn from."""
        rows = logits.to(self.drafts.logits.dtype).view(len(idx_mapping), len(level.nodes_np), -1)
        self.drafts.logits[idx_mapping, level.internal] = rows
        self.write_tokens(level, idx_mapping, children)

    def write_tokens(
        self,
        level: DraftLevel,
        # [num_reqs] int64
        idx_mapping: torch.Tensor,
        # of [num_reqs * num_expanded] rows
        children: Children,
    ) -> None:
        """Store the children of one level's nodes; the rows are kept already."""
        num_reqs = len(idx_mapping)
        sampled = children.sampled.view(num_reqs, len(level.nodes_np))
        self.drafts.sampled[idx_mapping, level.internal] = sampled
        tokens = children.tokens.view(num_reqs, -1)
        if level.select is not None:
            tokens = tokens[:, level.select]
        self.tokens[idx_mapping, level.children] = tokens
