# SPDX-License-Identifier: Apache-2.0
"""Where a step's tree tokens stand: RoPE positions by depth, and what each token sees.

A request's last 1 + n tokens are its tree's root and first n drafted nodes, in consecutive slots.
vLLM's positions count slots, which is right for the KV cache and wrong for RoPE.
"""

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_spechub.attention.visibility import TreeVisibility
from vllm_spechub.engine.node_tables import NodeTables
from vllm_spechub.engine.request_trees import RequestTrees
from vllm_spechub.triton_kernels.step_inputs import Layout, lay_out


class TreeLayout:
    """Per-token positions and visibility of a batch, in buffers that CUDA graphs can replay."""

    def __init__(
        self, request_trees: RequestTrees, max_num_tokens: int, device: torch.device
    ) -> None:
        self.device = device
        self.nodes = NodeTables(request_trees, device)
        # Depths are known of every tree. An entry for each of its copies' nodes.
        depths, slot_of_node = [], []
        for tree, copies in zip(request_trees.trees, self.nodes.copies, strict=True):
            depths.append(np.tile(tree.depths, copies))
            slot_of_node.append(np.tile(np.arange(tree.num_nodes + 1), copies))
        ordinary, slot = np.zeros(1, dtype=np.int64), np.concatenate(slot_of_node)
        depth_minus_slot = np.concatenate([ordinary, np.concatenate(depths) - slot])
        until_minus_slot = np.concatenate([ordinary + 1, -slot])
        # [num_entries] each
        self._tables = [torch.from_numpy(table) for table in (depth_minus_slot, until_minus_slot)]
        self.place_tables()
        self.buffers = Layout(
            positions=torch.zeros(max_num_tokens, dtype=torch.int64, device=device),
            visible_until=torch.zeros(max_num_tokens, dtype=torch.int32, device=device),
            tree_mask=torch.zeros(max_num_tokens, dtype=torch.int64, device=device),
        )
        self.positions = self.buffers.positions

    def place_tables(self) -> None:
        """Copy the trees' tables to the device, again after sleep mode has discarded them."""
        tables = [table.to(self.device, copy=True) for table in self._tables]
        self._rope_offset, self._until_offset = tables
        self.nodes.place_tables()

    def update(self, batch: InputBatch) -> TreeVisibility:
        """Fill the buffers for this batch. Padding tokens are laid out as ordinary ones.

        Returns:
            Views of the buffers, [num_tokens_after_padding] each.
        """
        num_tokens = batch.num_tokens_after_padding
        entries = np.zeros(num_tokens, dtype=np.int32)
        drafts = batch.num_draft_tokens_per_req
        num_tree_tokens = np.zeros(batch.num_reqs, dtype=np.int64)
        if drafts is not None:
            num_tree_tokens = np.where(drafts > 0, drafts + 1, 0)
            ends = batch.query_start_loc_np[1 : batch.num_reqs + 1]
            # The root and its n nodes are at the end of every request that has a tree.
            start = np.repeat(ends - num_tree_tokens, num_tree_tokens)
            first = np.repeat(np.cumsum(num_tree_tokens) - num_tree_tokens, num_tree_tokens)
            node = np.arange(num_tree_tokens.sum()) - first
            root = self.nodes.root_entries(batch.idx_mapping_np)
            entries[start + node] = np.repeat(root, num_tree_tokens) + node
        lay_out(
            self.buffers,
            batch.positions[:num_tokens],
            async_tensor_h2d(entries, device=self.device),
            self._rope_offset,
            self._until_offset,
            self.nodes.flat("ancestor_masks"),
        )
        return TreeVisibility(
            visible_until=self.buffers.visible_until[:num_tokens],
            tree_mask=self.buffers.tree_mask[:num_tokens],
            num_tree_tokens=num_tree_tokens,
        )
