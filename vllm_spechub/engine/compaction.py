# SPDX-License-Identifier: Apache-2.0
"""Moves the accepted path's KV to where a plain decode would have written it.

The target wrote every tree node to a slot of its own. The next step, the prefix cache and
preemption all read consecutive slots, so the path moves before anything else can read it.
"""

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables

from vllm_spechub.config import spechub_config
from vllm_spechub.engine.platform import Compactor, Platform


class PathCompactor:
    """Compacts the target's KV caches after each verification, one cache group after the other.

    A draft writes accepted tokens again, so its layers need no compaction, unless it reads what the
    target reads and nothing twice: as a member of a combined target, as all other members do.
    """

    def __init__(self, vllm_config: VllmConfig, platform: Platform) -> None:
        self.layers = vllm_config.compilation_config.static_forward_context
        self.platform = platform
        self.moves_draft = spechub_config(vllm_config).reads_draft
        self.compactors: list[tuple[int, Compactor]] = []

    def bind(self, kv_cache_config: KVCacheConfig, block_tables: BlockTables) -> None:
        """Make the compactors of the target's cache tensors, once those are allocated.

        Raises:
            RuntimeError: a layer's attention backend does not support trees.
        """
        cache_views, compactor = self.platform.cache_kernels()
        self.block_tables = block_tables
        self.compactors = []
        for group_id, group in enumerate(kv_cache_config.kv_cache_groups):
            layers = [self.layers[name] for name in group.layer_names]
            for layer in layers:
                backend = layer.get_attn_backend()
                if not getattr(backend.get_builder_cls(), "accepts_tree", False):
                    raise RuntimeError(
                        f"spechub: an attention layer runs on {backend.__name__}, which does not "
                        "support trees; leave attention_backend unset"
                    )
            views = [
                view
                for layer in layers
                if self.moves_draft or not getattr(layer, "is_draft_layer", False)
                for view in cache_views(layer.kv_cache)
            ]
            if views:
                self.compactors.append((group_id, compactor(views)))

    def __call__(
        self,
        # [num_reqs] int64
        root_positions: torch.Tensor,
        # [num_reqs, depth + 1] int32
        path: torch.Tensor,
    ) -> None:
        """Move the keys and values of each request's accepted path.

        Args:
            root_positions: the sequence position of each request's root.
            path: the accepted node of each depth, 0 first; -1 past the end.
        """
        num_reqs = path.shape[0]
        for group_id, compact in self.compactors:
            block_table = self.block_tables.input_block_tables[group_id][:num_reqs]
            compact(block_table, root_positions, path)
