# SPDX-License-Identifier: Apache-2.0
"""`DraftBuffers`, `DraftState`: what verification must know of how a tree was drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_spechub.topology import TokenTree


@dataclass(frozen=True)
class DraftLevel:
    """The internal nodes of one depth: what one draft pass expands."""

    # [num_expanded] int32 on the device and on the host
    nodes: torch.Tensor
    nodes_np: np.ndarray
    # [num_expanded] int32
    num_children: torch.Tensor
    max_children: int
    # [num_expanded] int64, bit i stands for tree node i
    ancestor_masks: torch.Tensor
    # breadth-first numbering makes both contiguous
    internal: slice
    children: slice
    # [num_children_in_all] int64, where the children are in a [num_expanded * max_children] row
    select: torch.Tensor


class DraftBuffers:
    """What requests have drafted, with room for the largest of several trees.

    Args:
        trees: those that requests may draft.
        max_num_reqs: request-state slots.
        vocab_size: width of a draft row.
        dtype: of the draft logits, kept as the draft model gave them: what is verified must be
            what was drawn.
        device: where the buffers live.
    """

    def __init__(
        self,
        trees: Sequence[TokenTree],
        max_num_reqs: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        num_nodes = max(tree.num_nodes for tree in trees)
        # only nodes with children have a distribution to remember
        num_internal = max(len(tree.internal_nodes) for tree in trees)
        # [max_num_reqs, num_nodes], node i in column i - 1
        self.tokens = torch.zeros(max_num_reqs, num_nodes, dtype=torch.int64, device=device)
        # [max_num_reqs, num_internal, vocab_size], truncated, before temperature
        self.logits = torch.zeros(
            max_num_reqs, num_internal, vocab_size, dtype=dtype, device=device
        )
        # [max_num_reqs, num_internal], the slot that holds the sampled child
        self.sample_slots = torch.zeros(
            max_num_reqs, num_internal, dtype=torch.int32, device=device
        )
        self.states = [DraftState(tree, self) for tree in trees]


class DraftState:
    """Per-request drafts of a static tree, and the tree's tables on the device.

    Args:
        tree: the tree that was drafted.
        buffers: where its drafts are, among those of other trees.
    """

    def __init__(self, tree: TokenTree, buffers: DraftBuffers) -> None:
        def table(array) -> torch.Tensor:
            return torch.tensor(array, device=buffers.tokens.device)

        self.tree = tree
        # A smaller tree leaves the last columns of each unused.
        self.tokens, self.logits = buffers.tokens, buffers.logits
        self.sample_slots = buffers.sample_slots
        # [num_nodes + 1] each
        self.first_child = table(tree.first_child)
        self.num_children = table(tree.num_children)
        self.internal_index = table(tree.internal_index)
        self.subtree_sizes = table(tree.subtree_sizes)
        self.levels = [self._level(nodes, table) for nodes in tree.internal_levels()]

    def _level(self, nodes: np.ndarray, table) -> DraftLevel:
        tree = self.tree
        counts = tree.num_children[nodes]
        first_internal = int(tree.internal_index[nodes[0]])
        first_child = int(tree.first_child[nodes[0]])
        has_child = np.arange(counts.max()) < counts[:, None]
        return DraftLevel(
            nodes=table(nodes),
            nodes_np=nodes,
            num_children=table(counts),
            max_children=int(counts.max()),
            ancestor_masks=table(tree.ancestor_masks[nodes]),
            internal=slice(first_internal, first_internal + len(nodes)),
            children=slice(first_child - 1, first_child - 1 + int(counts.sum())),
            select=table(np.flatnonzero(has_child)),
        )

    def write_children(
        self,
        level: DraftLevel,
        # [num_reqs] int64
        idx_mapping: torch.Tensor,
        # [num_reqs * num_expanded, vocab_size]
        logits: torch.Tensor,
        # [num_reqs * num_expanded, max_children] int64
        tokens: torch.Tensor,
        # [num_reqs * num_expanded] int32
        sample_slots: torch.Tensor,
    ) -> None:
        """Store the children of one level's nodes."""
        num_reqs, num_expanded = len(idx_mapping), len(level.nodes_np)
        logits = logits.to(self.logits.dtype).view(num_reqs, num_expanded, -1)
        self.logits[idx_mapping, level.internal] = logits
        self.sample_slots[idx_mapping, level.internal] = sample_slots.view(num_reqs, num_expanded)
        self.tokens[idx_mapping, level.children] = tokens.view(num_reqs, -1)[:, level.select]
