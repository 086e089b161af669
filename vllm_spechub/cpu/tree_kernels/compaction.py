# SPDX-License-Identifier: Apache-2.0
"""KV compaction, compiled by Numba: the CPU's version of `triton_kernels.compaction`."""

from collections.abc import Sequence

import torch

from vllm_spechub.cpu.tree_kernels.vector_math import jit
from vllm_spechub.triton_kernels.compaction.reference import raw_bits_once


@jit
def _compact(
    # each [num_blocks, block_size, num_kv_heads, content]
    views,
    # [num_reqs, max_num_blocks]
    block_table,
    # [num_reqs]
    root_positions,
    # [num_reqs, max_depth + 1]
    path,
):
    """Copy sequence position `root + path[:, j]` to `root + j` in every view, as `KVCompactor`."""
    block_size = views[0].shape[1]
    for r in range(path.shape[0]):
        for depth in range(1, path.shape[1]):
            node = path[r, depth]
            if node < 0:
                break
            if node == depth:
                continue
            # A path's nodes ascend and are at least their depth, so what is overwritten has moved.
            source, target = root_positions[r] + node, root_positions[r] + depth
            for view in views:
                moved = view[block_table[r, source // block_size], source % block_size]
                place = view[block_table[r, target // block_size], target % block_size]
                for head in range(moved.shape[0]):
                    for i in range(moved.shape[1]):
                        place[head, i] = moved[head, i]


class HostKVCompactor:
    """`KVCompactor` for caches in the host's memory.

    Args:
        kv_views: as `KVCompactor` takes them.
    """

    def __init__(
        self,
        # each [num_blocks, block_size, num_kv_heads, content]
        kv_views: Sequence[torch.Tensor],
    ) -> None:
        self.kv_views = raw_bits_once(kv_views)
        # Layers that have the same shape and type share a call.
        kinds: dict[tuple, list] = {}
        for view in self.kv_views:
            kinds.setdefault((view.dtype, view.shape[1:]), []).append(view.numpy())
        self._kinds = [tuple(arrays) for arrays in kinds.values()]
        nothing = torch.zeros(0, 1, dtype=torch.int32)
        self(nothing, torch.zeros(0, dtype=torch.int64), nothing)  # compiles before the first step

    def __call__(
        self,
        # [num_reqs, max_num_blocks] int32
        block_table: torch.Tensor,
        # [num_reqs] int64
        root_positions: torch.Tensor,
        # [num_reqs, max_depth + 1] int32
        path: torch.Tensor,
    ) -> None:
        """Copy sequence position `root + path[:, j]` to `root + j` for every depth `j >= 1`."""
        places = block_table.numpy(), root_positions.numpy(), path.numpy()
        for arrays in self._kinds:
            _compact(arrays, *places)
