# SPDX-License-Identifier: Apache-2.0
"""Moves the accepted path's KV to where a plain decode would have written it.

The target wrote every tree node to its own slot. The next step, the prefix cache and preemption
all read consecutive slots, so the path moves before anything else can look.
"""

from collections.abc import Callable

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables


class PathCompactor:
    """One `KVCompactor` per KV cache group of the target; the draft rewrites its own cache."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.layers = vllm_config.compilation_config.static_forward_context
        self.compactors: list[tuple[int, Callable[..., None]]] = []

    def bind(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        """Take hold of the target's cache tensors once they are allocated."""
        if current_platform.is_cpu():
            from vllm_spechub.attention.cpu_backend import cache_views
            from vllm_spechub.cpu.tree_kernels.compaction import HostKVCompactor as Compactor
        else:
            from vllm_spechub.attention.triton_backend import cache_views
            from vllm_spechub.triton_kernels.compaction import KVCompactor as Compactor

        self.block_tables = block_tables
        self.compactors = []
        for group_id, group in enumerate(kv_cache_config.kv_cache_groups):
            layers = [self.layers[name] for name in group.layer_names]
            for layer in layers:
                backend = layer.get_attn_backend()
                if not getattr(backend.get_builder_cls(), "accepts_tree", False):
                    raise RuntimeError(
                        f"spechub: an attention layer runs on {backend.__name__}, which knows no "
                        "trees; leave attention_backend unset"
                    )
            views = [
                view
                for layer in layers
                if not getattr(layer, "is_draft_layer", False)
                for view in cache_views(layer.kv_cache)
            ]
            if views:
                self.compactors.append((group_id, Compactor(views)))

    def __call__(
        self,
        # [num_reqs] int64
        root_positions: torch.Tensor,
        # [num_reqs, depth + 1] int32
        path: torch.Tensor,
    ) -> None:
        num_reqs = path.shape[0]
        for group_id, compact in self.compactors:
            block_table = self.block_tables.input_block_tables[group_id][:num_reqs]
            compact(block_table, root_positions, path)
