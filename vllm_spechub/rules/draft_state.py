# SPDX-License-Identifier: Apache-2.0
"""`DraftBuffers`, `DraftState`: what verification must know of how a tree was drawn."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from vllm_spechub.rules.grown_trees import grown_trees
from vllm_spechub.trees.level_tree import LevelTree
from vllm_spechub.trees.tree import TokenTree, Tree
from vllm_spechub.triton_kernels.arguments import Children, Drafts, GrownTrees, TreeTables
from vllm_spechub.triton_kernels.constants import MAX_CHILDREN


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

    # [num_expanded] int32, on the host
    nodes_np: np.ndarray
    max_children: int
    # [num_expanded] each: int32; int64, where the node's token is among the request's; int64
    nodes: torch.Tensor
    columns: torch.Tensor
    depths: torch.Tensor
    # breadth-first numbering makes both contiguous
    internal: slice
    children: slice
    # [num_children_in_all] int64, where the children are in a [num_expanded * max_children] row;
    # None where all nodes have as many, or each request's tree decides
    select: torch.Tensor | None
    # of as many requests as there may be
    all_rows: LevelRows
    # [most_requests + 1] int32, each request's first row, on the device and on the host
    starts: torch.Tensor
    starts_np: np.ndarray
    _rows: dict[int, LevelRows] = field(default_factory=dict)

    def replaced(self, num_reqs: int, **tables: torch.Tensor) -> "DraftLevel":
        """The same for a batch of so many requests, with other tables of its rows."""
        return replace(self, all_rows=self.rows(num_reqs)._replace(**tables), _rows={})

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
        most_requests: Mapping[Tree, int],
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
    """Per-request drafts of a tree, and the tree's tables on the device.

    Attributes:
        tables: of the tree; of a `LevelTree` those of each request's.
        grown: what the requests have made of a `LevelTree`; None for a static tree.

    Args:
        tree: the tree that was drafted.
        tokens: int64, node i in column i - 1.
        drafts: how they were drafted.
        rows: if rows are given to requests, of which the last one is nobody's; None if a row is
            that of the request's state.
    """

    def __init__(
        self,
        tree: Tree,
        # [num_rows, num_nodes]
        tokens: torch.Tensor,
        drafts: Drafts,
        rows: DraftRows | None = None,
        grown: GrownTrees | None = None,
    ) -> None:
        def table(array: np.ndarray) -> torch.Tensor:
            return torch.tensor(array, device=tokens.device)

        self.tree, self.tokens, self.drafts, self.rows = tree, tokens, drafts, rows
        self.grown = grown
        static = tree
        if isinstance(tree, LevelTree):
            self.grown = grown or grown_trees(tree, len(tokens), tokens.device)
            self.tables, static = self.grown.tables, tree.undrafted
        assert isinstance(static, TokenTree)
        if self.grown is None:
            self.tables = TreeTables(
                table(static.first_child),
                table(static.num_children),
                table(static.internal_index),
                table(np.array([0, *static.parents], dtype=np.int32)),
            )
        levels = tree.internal_levels()
        self.levels = [
            self._level(nodes, above, static, table)
            for nodes, above in zip(levels, [levels[0], *levels], strict=False)
        ]

    @classmethod
    def empty(
        cls,
        tree: Tree,
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

    def level(
        self,
        depth: int,
        # [num_reqs] int64
        draft_rows: torch.Tensor,
    ) -> DraftLevel:
        """The internal nodes of one depth in the trees of some requests. Of a `LevelTree` their
        children are not decided yet."""
        level = self.levels[depth]
        if self.grown is None:
            return level
        num_reqs, nodes = len(draft_rows), level.nodes_np
        rows, columns = level.rows(num_reqs), slice(int(nodes[0]), int(nodes[-1]) + 1)
        above = self.levels[max(depth - 1, 0)].nodes_np
        parents = self.grown.tables.parents[draft_rows, columns].flatten()
        return level.replaced(
            num_reqs,
            parent_rows=rows.req * len(above) + parents - int(above[0]),
            ancestor_masks=self.grown.ancestor_masks[draft_rows, columns].flatten(),
        )

    def with_children(
        self,
        level: DraftLevel,
        # [num_reqs] int64
        draft_rows: torch.Tensor,
    ) -> DraftLevel:
        """A level of a `LevelTree`, once the numbers of its children are decided."""
        nodes = level.nodes_np
        columns = slice(int(nodes[0]), int(nodes[-1]) + 1)
        counts = self.tables.num_children[draft_rows, columns].flatten()
        return level.replaced(len(draft_rows), num_children=counts)

    def _level(self, nodes: np.ndarray, above: np.ndarray, static: TokenTree, table) -> DraftLevel:
        tree = self.tree
        parents = np.searchsorted(above, np.array([0, *static.parents])[nodes])
        counts = static.num_children[nodes]
        max_children = int(counts.max())
        first_internal = int(tree.internal_index[nodes[0]])
        depth = int(tree.depths[nodes[0]])
        first_child = sum(tree.level_sizes[: depth + 1])
        num_below = tree.level_sizes[depth + 1]
        if self.grown is not None:
            max_children = min(MAX_CHILDREN, num_below)
        has_child = np.arange(max_children) < counts[:, None]
        max_num_reqs = len(self.tokens)
        starts = np.arange(max_num_reqs + 1, dtype=np.int32) * len(nodes)
        parent_rows = np.arange(max_num_reqs)[:, None] * len(above) + parents
        return DraftLevel(
            nodes_np=nodes,
            max_children=max_children,
            nodes=table(nodes),
            columns=table(nodes.astype(np.int64) - 1),
            depths=table(tree.depths[nodes].astype(np.int64)),
            internal=slice(first_internal, first_internal + len(nodes)),
            children=slice(first_child - 1, first_child - 1 + num_below),
            select=table(np.flatnonzero(has_child))
            if self.grown is None and not has_child.all()
            else None,
            all_rows=LevelRows(
                req=table(np.arange(max_num_reqs).repeat(len(nodes))),
                nodes=table(np.tile(nodes, max_num_reqs)),
                num_children=table(np.tile(counts, max_num_reqs)),
                column=table(np.tile(nodes.astype(np.int64) - 1, max_num_reqs)),
                internal=table(np.tile(tree.internal_index[nodes].astype(np.int32), max_num_reqs)),
                parent_rows=table(parent_rows.ravel()),
                ancestor_masks=table(np.tile(static.ancestor_masks[nodes], max_num_reqs)),
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
        if self.grown is not None:
            first, below = int(level.nodes_np[0]), level.children
            # a child's parent and its slot, [num_reqs, num_children_in_all]
            parents = self.tables.parents[idx_mapping, below.start + 1 : below.stop + 1].long()
            child = torch.arange(below.start + 1, below.stop + 1, device=parents.device)
            slots = child - self.tables.first_child[idx_mapping].gather(1, parents)
            # padding requests of a graph share a row, which may then hold a mixture of trees
            slots = slots.clamp(0, level.max_children - 1)
            tokens = tokens.gather(1, (parents - first) * level.max_children + slots)
        self.tokens[idx_mapping, level.children] = tokens
