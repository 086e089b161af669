# SPDX-License-Identifier: Apache-2.0
"""Moves the KV entries of an accepted path into consecutive positions, in place."""

from collections.abc import Sequence

import torch

from .reference import compact_reference, raw_bits_once

__all__ = ["KVCompactor", "compact_reference"]


class KVCompactor:
    """Compacts the layers of one KV cache group after each verification.

    Views that share shape, strides and element size move in one launch, so a group of alike
    layers costs one launch in all.

    Examples::

        # Triton and FlashAttention layers: [num_blocks, num_kv_heads, block_size, 2 * head_size]
        compact = KVCompactor([layer.kv_cache.transpose(1, 2) for layer in layers])
        compact(block_table, root_positions, path)

    Args:
        kv_views: per tensor to compact (a layer's keys, its values, or both side by side in the
            last dimension) a view [num_blocks, block_size, num_kv_heads, content] with any
            strides and any dtype. Layers that share a cache give the same view, which moves once.
            The memory must stay where it is while this object is used.

    Raises:
        ValueError: no view, a view that is not 4-D, or views that disagree on block size or device.
    """

    def __init__(
        self,
        # each [num_blocks, block_size, num_kv_heads, content]
        kv_views: Sequence[torch.Tensor],
    ) -> None:
        if not kv_views:
            raise ValueError("kv_views: expected at least one view")
        first = kv_views[0]
        for view in kv_views:
            if view.dim() != 4:
                raise ValueError(f"kv_views: expected 4 dimensions, got {list(view.shape)}")
            if view.shape[1] != first.shape[1] or view.device != first.device:
                raise ValueError("kv_views: views differ in block size or device")
        # This also keeps the memory alive that the device pointers of `plan_launches` point to.
        self.kv_views = raw_bits_once(kv_views)
        self.launches = []
        if first.is_cuda:
            from .kernel import plan_launches

            self.launches = plan_launches(self.kv_views)

    def __call__(
        self,
        # [num_reqs, max_num_blocks]
        block_table: torch.Tensor,
        # [num_reqs]
        root_positions: torch.Tensor,
        # [num_reqs, max_depth + 1]
        path: torch.Tensor,
    ) -> None:
        """Copy sequence position `root + path[:, j]` to `root + j` for every depth `j >= 1`.

        On a GPU this enqueues work and returns; nothing is read back.

        Args:
            block_table: int32.
            root_positions: int64, the sequence position of each request's root.
            path: int32, the accepted node (breadth-first number) at each depth: 0 first, strictly
                increasing with `path[:, j] >= j`, and -1 past the end. A request without a tree
                has -1 from depth 1 on.

        Raises:
            ValueError: a shape or dtype does not fit; the message names the argument.
        """
        num_reqs = root_positions.shape[0]
        if block_table.dtype != torch.int32 or block_table.shape[0] < num_reqs:
            raise ValueError("block_table: expected int32 [num_reqs, max_num_blocks]")
        if root_positions.dtype != torch.int64:
            raise ValueError("root_positions: expected int64 [num_reqs]")
        if path.dtype != torch.int32 or path.dim() != 2 or path.shape[0] != num_reqs:
            raise ValueError("path: expected int32 [num_reqs, max_depth + 1]")
        if block_table.stride(-1) != 1 or path.stride(-1) != 1:
            raise ValueError("block_table, path: last dimension must be contiguous")
        if not self.launches:
            compact_reference(self.kv_views, block_table, root_positions, path)
        for launch in self.launches:
            launch(block_table, root_positions, path)
