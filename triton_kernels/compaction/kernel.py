# SPDX-License-Identifier: Apache-2.0
"""Triton kernel for KV compaction: one launch for all layers that share a layout."""

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl

MAX_ELEMENTS = 2048  # that one program moves at once
POINTER_ALIGNMENT = 16
ELEMENT_BITS = {torch.uint8: 8, torch.int16: 16, torch.int32: 32, torch.int64: 64}


@triton.jit
def _compact_kernel(
    # [num_views] addresses of [num_blocks, BLOCK_SIZE, NUM_HEADS, CONTENT]
    view_address_ptr,
    # [num_reqs, max_num_blocks]
    block_table_ptr,
    # [num_reqs]
    root_positions_ptr,
    # [num_reqs, PATH_LEN]
    path_ptr,
    block_table_stride,
    path_stride,
    block_stride,
    slot_stride,
    head_stride,
    content_stride,
    ELEMENT_BITS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    CONTENT: tl.constexpr,
    PATH_LEN: tl.constexpr,
    PATH_PADDED: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    CONTENT_PADDED: tl.constexpr,
):
    """Grid: (num_reqs, num_views, head blocks). Each program owns some heads of one view."""
    req = tl.program_id(0).to(tl.int64)
    depths = tl.arange(0, PATH_PADDED)
    nodes = tl.load(path_ptr + req * path_stride + depths, mask=depths < PATH_LEN, other=-1)
    moves = (nodes >= 0) & (nodes != depths)
    last_move = tl.max(tl.where(moves, depths, 0), axis=0)
    if last_move == 0:
        return

    root = tl.load(root_positions_ptr + req)
    block_row_ptr = block_table_ptr + req * block_table_stride
    address = tl.load(view_address_ptr + tl.program_id(1))
    element: tl.constexpr = tl.core.get_int_dtype(ELEMENT_BITS, True)
    view_ptr = tl.multiple_of(address.to(tl.pointer_type(element)), ALIGNMENT)
    heads = tl.program_id(2) * HEADS_PADDED + tl.arange(0, HEADS_PADDED)
    content = tl.arange(0, CONTENT_PADDED)
    element_mask = (heads < NUM_HEADS)[:, None] & (content < CONTENT)[None, :]
    # [HEADS_PADDED, CONTENT_PADDED]
    entry = heads.to(tl.int64)[:, None] * head_stride + content[None, :] * content_stride

    for depth in range(1, last_move + 1):
        node = tl.load(path_ptr + req * path_stride + depth)
        if node != depth:
            source = root + node
            target = root + depth
            source_block = tl.load(block_row_ptr + source // BLOCK_SIZE).to(tl.int64)
            target_block = tl.load(block_row_ptr + target // BLOCK_SIZE).to(tl.int64)
            source_at = source_block * block_stride + (source % BLOCK_SIZE) * slot_stride
            target_at = target_block * block_stride + (target % BLOCK_SIZE) * slot_stride
            bits = tl.load(view_ptr + source_at + entry, mask=element_mask)
            # A later depth may overwrite this source, so all threads must have read it by then.
            tl.debug_barrier()
            tl.store(view_ptr + target_at + entry, bits, mask=element_mask)


def _launch(
    # each [num_blocks, block_size, num_kv_heads, content], alike
    views: list[torch.Tensor],
    # [num_views]
    addresses: torch.Tensor,
    alignment: int,
    # [num_reqs, max_num_blocks]
    block_table: torch.Tensor,
    # [num_reqs]
    root_positions: torch.Tensor,
    # [num_reqs, max_depth + 1]
    path: torch.Tensor,
) -> None:
    num_reqs, path_len = path.shape
    if num_reqs == 0:
        return
    _, block_size, num_heads, content = views[0].shape
    content_padded = triton.next_power_of_2(content)
    heads_padded = min(triton.next_power_of_2(num_heads), max(1, MAX_ELEMENTS // content_padded))
    _compact_kernel[(num_reqs, len(views), triton.cdiv(num_heads, heads_padded))](
        addresses,
        block_table,
        root_positions,
        path,
        block_table.stride(0),
        path.stride(0),
        *views[0].stride(),
        ELEMENT_BITS=ELEMENT_BITS[views[0].dtype],
        ALIGNMENT=alignment,
        BLOCK_SIZE=block_size,
        NUM_HEADS=num_heads,
        CONTENT=content,
        PATH_LEN=path_len,
        PATH_PADDED=triton.next_power_of_2(path_len),
        HEADS_PADDED=heads_padded,
        CONTENT_PADDED=content_padded,
    )


def plan_launches(
    # each [num_blocks, block_size, num_kv_heads, content], as raw bits
    kv_views: Sequence[torch.Tensor],
) -> list[partial]:
    """Group the views that share a layout, and copy each group's addresses to the device.

    Returns:
        For each group, a function of (block_table, root_positions, path) that launches the kernel.
    """
    groups: dict[tuple, list[torch.Tensor]] = {}
    for view in kv_views:
        groups.setdefault((view.shape[1:], view.stride(), view.dtype), []).append(view)
    launches = []
    for views in groups.values():
        pointers = [view.data_ptr() for view in views]
        aligned = all(pointer % POINTER_ALIGNMENT == 0 for pointer in pointers)
        alignment = POINTER_ALIGNMENT if aligned else views[0].element_size()
        addresses = torch.tensor(pointers, dtype=torch.int64, device=views[0].device)
        launches.append(partial(_launch, views, addresses, alignment))
    return launches
