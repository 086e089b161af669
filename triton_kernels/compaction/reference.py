# SPDX-License-Identifier: Apache-2.0
"""KV compaction in plain PyTorch: what the kernel is tested against, and the CPU path."""

from collections.abc import Sequence

import torch

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_raw_bits(
    # any shape and strides
    tensor: torch.Tensor,
) -> torch.Tensor:
    """View the same memory as integers: bits move unchanged, and fp8 caches can be indexed."""
    return tensor.view(_INTEGER_OF_SIZE[tensor.element_size()])


def raw_bits_once(
    # each [num_blocks, block_size, num_kv_heads, content]
    kv_views: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """The views as integers, without those of memory that is already among them: layers may share
    a cache, and a path must move once."""
    views = [as_raw_bits(view) for view in kv_views]
    once = {(view.data_ptr(), view.shape, view.stride(), view.dtype): view for view in views}
    return list(once.values())


def compact_reference(
    # each [num_blocks, block_size, num_kv_heads, content]
    kv_views: Sequence[torch.Tensor],
    # [num_reqs, max_num_blocks]
    block_table: torch.Tensor,
    # [num_reqs]
    root_positions: torch.Tensor,
    # [num_reqs, max_depth + 1]
    path: torch.Tensor,
) -> None:
    """Gather every entry that moves, then scatter them. Arguments as `KVCompactor`."""
    depths = torch.arange(path.shape[1], device=path.device)
    req, depth = ((path >= 0) & (path != depths)).nonzero(as_tuple=True)
    if req.numel() == 0:
        return
    block_size = kv_views[0].shape[1]
    source = root_positions[req] + path[req, depth]
    target = root_positions[req] + depth
    source_block = block_table[req, source // block_size].long()
    target_block = block_table[req, target // block_size].long()
    for view in kv_views:
        # Indexing copies, so a target may be another move's source.
        moved = view[source_block, source % block_size]
        view[target_block, target % block_size] = moved
