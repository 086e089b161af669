# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for paged tree attention.

One flash-attention loop (Dao, "FlashAttention-2", 2023) whose rows are the query tokens of one
request times the query heads of one KV head, as in vLLM's `triton_unified_attention`. Keys that
every row of a block sees are folded in without a mask; only the last tiles, which hold the causal
diagonal or the tree, test visibility.

The keys of long requests are split over programs (flash-decoding), and a second kernel merges the
parts. How many parts a request has follows from the lengths of all requests, which only the device
knows: a launch has as many programs as there are query blocks, and some more, which go where the
tiles are. So a graph that was captured for a batch's shape serves every batch of that shape.
"""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
# The programs that a launch has beyond one for each query block and KV head: about as many as run
# at the same time.
MORE_PROGRAMS = 256
MAX_SPLITS = tl.constexpr(64)
# A part of a request has at least so many tiles: with fewer, merging costs more than it saves.
MIN_TILES = 8
# Rows of a block that one program merges.
MERGED_ROWS = 16
# Requests that a program looks at together to find its own.
_REQS = tl.constexpr(128)


@triton.jit
def _bitwise_or(left, right):
    return left | right


@triton.jit
def _count_bits(
    # any shape, int64
    bits,
):
    """How many bits are set. Shifts repeat the sign bit, but the masks remove the copies."""
    bits = bits - ((bits >> 1) & 0x5555555555555555)
    bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
    bits += bits >> 8
    bits += bits >> 16
    bits += bits >> 32
    return (bits & 0x7F).to(tl.int32)


@triton.jit
def _blocks_and_tiles(
    # [num_reqs + 1]
    query_start_loc_ptr,
    # [num_reqs]
    seq_lens_ptr,
    first,
    num_reqs,
    window,
    BLOCK_Q: tl.constexpr,
    TILE: tl.constexpr,
):
    """How many query blocks requests have, and how many tiles of keys each of these reads at most.
    [_REQS] each, from a first request on"""
    reqs = first + tl.arange(0, _REQS)
    inside = reqs < num_reqs
    start = tl.load(query_start_loc_ptr + reqs, mask=inside, other=0)
    end = tl.load(query_start_loc_ptr + reqs + 1, mask=inside, other=0)
    keys = tl.load(seq_lens_ptr + reqs, mask=inside, other=0)
    if window > 0:
        keys = tl.minimum(keys, window + end - start)
    return tl.cdiv(end - start, BLOCK_Q), tl.cdiv(keys, TILE)


@triton.jit
def _find_part(
    # [num_reqs + 1]
    query_start_loc_ptr,
    # [num_reqs]
    seq_lens_ptr,
    number,
    num_reqs,
    window,
    more,
    min_tiles,
    BLOCK_Q: tl.constexpr,
    TILE: tl.constexpr,
    OF_SPLIT: tl.constexpr,
):
    """Which part of the batch has a number, counting all, or only the parts OF_SPLIT requests.

    Returns:
        The request, -1 if there are not so many parts; how many parts each of its query blocks has;
        the block; which of the block's parts it is; its number among the parts of split requests,
        -1 if the request is not split.
    """
    total = tl.full([], 0, tl.int32)
    for first in range(0, num_reqs, _REQS):
        blocks, tiles = _blocks_and_tiles(
            query_start_loc_ptr, seq_lens_ptr, first, num_reqs, window, BLOCK_Q, TILE
        )
        total += tl.sum(blocks * tiles, axis=0)
    # So there are `more` parts beyond one for each block at most, and of split requests twice that.
    unit = tl.maximum(min_tiles, tl.cdiv(total, more))
    request = tl.full([], -1, tl.int32)
    splits = tl.full([], 1, tl.int32)
    place = tl.full([], 0, tl.int32)
    slot = tl.full([], 0, tl.int32)
    before = tl.full([], 0, tl.int32)
    slots_before = tl.full([], 0, tl.int32)
    for first in range(0, num_reqs, _REQS):
        blocks, tiles = _blocks_and_tiles(
            query_start_loc_ptr, seq_lens_ptr, first, num_reqs, window, BLOCK_Q, TILE
        )
        parts = tl.minimum(tl.maximum(tl.cdiv(tiles, unit), 1), MAX_SPLITS)
        of_split = tl.where(parts > 1, blocks * parts, 0)
        slots_begin = slots_before + tl.cumsum(of_split, axis=0) - of_split
        counted = of_split if OF_SPLIT else blocks * parts
        begin = slots_begin
        if not OF_SPLIT:
            begin = before + tl.cumsum(counted, axis=0) - counted
        own = (begin <= number) & (number < begin + counted)
        if tl.max(own.to(tl.int32), axis=0) > 0:
            request = first + tl.sum(tl.where(own, tl.arange(0, _REQS), 0), axis=0)
            splits = tl.sum(tl.where(own, parts, 0), axis=0)
            place = number - tl.sum(tl.where(own, begin, 0), axis=0)
            slot = tl.where(splits > 1, place + tl.sum(tl.where(own, slots_begin, 0), axis=0), -1)
        before += tl.sum(counted, axis=0)
        slots_before += tl.sum(of_split, axis=0)
    return request, splits, place // splits, place % splits, slot


@triton.jit
def _attend_tile(
    # [BLOCK_M, HEAD_PADDED]
    query,
    # [BLOCK_M]
    row_max,
    # [BLOCK_M]
    row_sum,
    # [BLOCK_M, HEAD_PADDED]
    acc,
    # [BLOCK_M]
    until,
    # [BLOCK_M]
    mask,
    # [BLOCK_M], the first key in each row's window
    first_visible,
    key_cache_ptr,
    value_cache_ptr,
    # [max_num_blocks], this request's row
    block_row_ptr,
    tile_start,
    key_begin,
    key_end,
    plain_end,
    tree_root,
    tree_union,
    qk_scale,
    softcap,
    key_block_stride,
    key_slot_stride,
    key_dim_stride,
    value_block_stride,
    value_slot_stride,
    value_dim_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    USE_SOFTCAP: tl.constexpr,
    USE_WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Fold the keys `tile_start .. tile_start + TILE` into the running softmax."""
    dims = tl.arange(0, HEAD_PADDED)
    keys_at = tile_start + tl.arange(0, TILE)
    dim_mask = dims < HEAD_SIZE
    if MASKED:
        # A slot that nobody sees may hold anything, and a weight of 0 times NaN is NaN.
        root_distance = keys_at - tree_root
        in_tree = (root_distance >= 0) & (root_distance < 64)
        in_tree = in_tree & (((tree_union >> (root_distance & 63).to(tl.int64)) & 1) == 1)
        key_mask = ((keys_at < plain_end) | in_tree) & (keys_at < key_end)
        if USE_WINDOW:
            key_mask = key_mask & (keys_at >= key_begin)
        block = tl.load(block_row_ptr + keys_at // BLOCK_SIZE, mask=key_mask, other=0)
        load_mask = key_mask[:, None] & dim_mask[None, :]
    else:
        block = tl.load(block_row_ptr + keys_at // BLOCK_SIZE)
        load_mask = dim_mask[None, :]
    block = block.to(tl.int64)
    slot = keys_at % BLOCK_SIZE

    # [TILE, HEAD_PADDED]
    key = tl.load(
        key_cache_ptr
        + (block * key_block_stride + slot * key_slot_stride)[:, None]
        + (dims * key_dim_stride)[None, :],
        mask=load_mask,
        other=0.0,
    ).to(query.dtype)
    # [BLOCK_M, TILE]
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * qk_scale
    if USE_SOFTCAP:
        # tanh(y) = 1 - 2 / (exp(2y) + 1) saturates for either sign; the scores become base-2 after.
        capped = 1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0)
        scores = softcap * 1.4426950408889634 * capped
    if MASKED:
        node = keys_at[None, :] - until[:, None]
        # The shift must stay in 0..63 also where the bit is not used.
        bit = (mask[:, None] >> (node & 63).to(tl.int64)) & 1
        visible = ((node < 0) | ((node < 64) & (bit == 1))) & key_mask[None, :]
        if USE_WINDOW:
            visible = visible & (keys_at[None, :] >= first_visible[:, None])
        scores = tl.where(visible, scores, float("-inf"))

    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_max[:, None])
    decay = tl.exp2(row_max - new_max)
    row_sum = row_sum * decay + tl.sum(weights, axis=1)
    # [TILE, HEAD_PADDED]
    value = tl.load(
        value_cache_ptr
        + (block * value_block_stride + slot * value_slot_stride)[:, None]
        + (dims * value_dim_stride)[None, :],
        mask=load_mask,
        other=0.0,
    ).to(query.dtype)
    acc = tl.dot(weights.to(value.dtype), value, acc * decay[:, None], input_precision="ieee")
    return new_max, row_sum, acc


@triton.jit(do_not_specialize=["num_reqs", "more", "min_tiles"])
def _tree_attention_kernel(
    # [num_tokens, num_q_heads, head_size], written for requests that are not split
    output_ptr,
    # [2 * more, num_kv_heads, BLOCK_M, HEAD_PADDED] float32, written for the others
    parts_ptr,
    # [2 * more, num_kv_heads, BLOCK_M] float32, base-2 log of each part's softmax sum
    part_lse_ptr,
    # [num_tokens, num_q_heads, head_size]
    query_ptr,
    # [num_blocks, BLOCK_SIZE, num_kv_heads, head_size]
    key_cache_ptr,
    # [num_blocks, BLOCK_SIZE, num_kv_heads, head_size]
    value_cache_ptr,
    # [num_reqs + 1]
    query_start_loc_ptr,
    # [num_reqs]
    seq_lens_ptr,
    # [num_reqs, max_num_blocks]
    block_table_ptr,
    # [num_tokens]
    visible_until_ptr,
    # [num_tokens]
    tree_mask_ptr,
    # [1] each, None unless the cache is quantised
    key_scale_ptr,
    value_scale_ptr,
    # [num_q_heads], None without sinks
    sinks_ptr,
    qk_scale,
    softcap,
    window,
    num_reqs,
    more,
    min_tiles,
    block_table_stride,
    query_token_stride,
    query_head_stride,
    output_token_stride,
    output_head_stride,
    key_block_stride,
    key_slot_stride,
    key_head_stride,
    key_dim_stride,
    value_block_stride,
    value_slot_stride,
    value_head_stride,
    value_dim_stride,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    USE_SOFTCAP: tl.constexpr,
    USE_WINDOW: tl.constexpr,
):
    """Grid: (bound on query blocks + more, num_kv_heads)."""
    kv_head = tl.program_id(1)
    req, num_splits, block, split, slot = _find_part(
        query_start_loc_ptr,
        seq_lens_ptr,
        tl.program_id(0),
        num_reqs,
        window,
        more,
        min_tiles,
        BLOCK_Q,
        TILE,
        False,
    )
    if req < 0:
        return
    query_start = tl.load(query_start_loc_ptr + req)
    query_len = tl.load(query_start_loc_ptr + req + 1) - query_start
    seq_len = tl.load(seq_lens_ptr + req)
    first_token = block * BLOCK_Q

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_PADDED)
    token_in_req = first_token + rows // GROUP_SIZE
    head = kv_head * GROUP_SIZE + rows % GROUP_SIZE
    # BLOCK_Q * GROUP_SIZE may be less than BLOCK_M, for groups that are no power of two.
    row_mask = (token_in_req < query_len) & (rows < BLOCK_Q * GROUP_SIZE)
    # 64-bit: a long prefill times a wide model passes 2^31 elements.
    token = (query_start + token_in_req).to(tl.int64)
    tile_mask = row_mask[:, None] & (dims < HEAD_SIZE)[None, :]
    # [BLOCK_M, HEAD_PADDED]
    query = tl.load(
        query_ptr
        + (token * query_token_stride + head * query_head_stride)[:, None]
        + dims[None, :],
        mask=tile_mask,
        other=0.0,
    )

    until = tl.load(visible_until_ptr + token, mask=row_mask, other=0)
    mask = tl.load(tree_mask_ptr + token, mask=row_mask, other=0)
    is_causal = until < 0
    until = tl.where(is_causal, seq_len - query_len + token_in_req + 1, until)
    mask = tl.where(is_causal, 0, mask)
    first_visible = tl.zeros([BLOCK_M], tl.int32)
    key_begin = 0
    if USE_WINDOW:
        num_ancestors = _count_bits(mask)
        first_visible = tl.maximum(until + num_ancestors - window, 0)
        key_begin = tl.min(tl.where(row_mask, first_visible, seq_len), axis=0)
        # The highest ancestors fall out of a window that is smaller than the tree is deep.
        outside = num_ancestors - window
        for _ in range(0, tl.maximum(tl.max(outside, axis=0), 0)):
            mask = tl.where(outside > 0, mask & (mask - 1), mask)
            outside -= 1
    # Rows of padding see nothing, and must not bound what the others share either.
    furthest = tl.where(row_mask, tl.where(mask == 0, until, until + 64), 0)
    key_end = tl.minimum(seq_len, tl.max(furthest, axis=0))
    shared_end = tl.minimum(seq_len, tl.min(tl.where(row_mask, until, seq_len), axis=0))

    # What any row sees, to skip slots that nobody does: before `plain_end`, or in the union of the
    # masks. Masks of different roots do not line up; then every slot counts as seen.
    plain_end = tl.max(tl.where(row_mask, until, 0), axis=0)
    tree_root = tl.min(tl.where(mask == 0, seq_len, until), axis=0)
    last_root = tl.max(tl.where(mask == 0, 0, until), axis=0)
    tree_union = tl.reduce(mask, 0, _bitwise_or)
    plain_end = tl.where(tree_root < last_root, key_end, plain_end)

    begin_tile = key_begin // TILE
    end_tile = (key_end + TILE - 1) // TILE
    tiles_per_split = tl.cdiv(tl.maximum(end_tile - begin_tile, 0), num_splits)
    first_tile = begin_tile + split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, end_tile)
    shared_tile = tl.maximum(tl.minimum(shared_end // TILE, last_tile), first_tile)
    if USE_WINDOW:
        shared_tile = first_tile  # a window has few tiles, and rows differ at both its ends

    if key_scale_ptr is not None:
        qk_scale *= tl.load(key_scale_ptr)
    key_cache_ptr += kv_head.to(tl.int64) * key_head_stride
    value_cache_ptr += kv_head.to(tl.int64) * value_head_stride
    block_row_ptr = block_table_ptr + req.to(tl.int64) * block_table_stride

    # Finite, so that a row that has seen nothing yet subtracts no infinities.
    row_max = tl.full([BLOCK_M], -3.0e38, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None and split == 0:
        # One more key for each head, whose value is zero. The first part counts it.
        sink = tl.load(sinks_ptr + head, mask=row_mask, other=0.0).to(tl.float32)
        row_max = tl.maximum(sink * 1.4426950408889634, row_max)
        row_sum += 1.0
    acc = tl.zeros([BLOCK_M, HEAD_PADDED], tl.float32)
    for tile in range(first_tile, shared_tile):
        row_max, row_sum, acc = _attend_tile(
            query,
            row_max,
            row_sum,
            acc,
            until,
            mask,
            first_visible,
            key_cache_ptr,
            value_cache_ptr,
            block_row_ptr,
            tile * TILE,
            key_begin,
            key_end,
            plain_end,
            tree_root,
            tree_union,
            qk_scale,
            softcap,
            key_block_stride,
            key_slot_stride,
            key_dim_stride,
            value_block_stride,
            value_slot_stride,
            value_dim_stride,
            BLOCK_SIZE,
            HEAD_SIZE,
            HEAD_PADDED,
            TILE,
            USE_SOFTCAP,
            USE_WINDOW,
            MASKED=False,
        )
    for tile in range(shared_tile, last_tile):
        row_max, row_sum, acc = _attend_tile(
            query,
            row_max,
            row_sum,
            acc,
            until,
            mask,
            first_visible,
            key_cache_ptr,
            value_cache_ptr,
            block_row_ptr,
            tile * TILE,
            key_begin,
            key_end,
            plain_end,
            tree_root,
            tree_union,
            qk_scale,
            softcap,
            key_block_stride,
            key_slot_stride,
            key_dim_stride,
            value_block_stride,
            value_slot_stride,
            value_dim_stride,
            BLOCK_SIZE,
            HEAD_SIZE,
            HEAD_PADDED,
            TILE,
            USE_SOFTCAP,
            USE_WINDOW,
            MASKED=True,
        )

    empty = row_sum == 0.0
    acc = acc / tl.where(empty, 1.0, row_sum)[:, None]
    if value_scale_ptr is not None:
        acc *= tl.load(value_scale_ptr)
    if slot < 0:
        tl.store(
            output_ptr
            + (token * output_token_stride + head * output_head_stride)[:, None]
            + dims[None, :],
            acc.to(output_ptr.dtype.element_ty),
            mask=tile_mask,
        )
    else:
        part = slot.to(tl.int64) * tl.num_programs(1) + kv_head
        at_row = part * BLOCK_M + rows
        tl.store(parts_ptr + (at_row * HEAD_PADDED)[:, None] + dims[None, :], acc, mask=tile_mask)
        lse = tl.where(empty, float("-inf"), row_max + tl.log2(row_sum))
        tl.store(part_lse_ptr + at_row, lse, mask=row_mask)


@triton.jit(do_not_specialize=["num_reqs", "more", "min_tiles"])
def _merge_splits_kernel(
    # [num_tokens, num_q_heads, head_size]
    output_ptr,
    # [2 * more, num_kv_heads, BLOCK_M, HEAD_PADDED] float32
    parts_ptr,
    # [2 * more, num_kv_heads, BLOCK_M] float32
    part_lse_ptr,
    # [num_reqs + 1]
    query_start_loc_ptr,
    # [num_reqs]
    seq_lens_ptr,
    num_reqs,
    window,
    more,
    min_tiles,
    output_token_stride,
    output_head_stride,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: (2 * more, num_kv_heads, BLOCK_M // ROWS). The program of a block's first part merges
    all of its parts."""
    kv_head = tl.program_id(1)
    req, num_splits, block, split, slot = _find_part(
        query_start_loc_ptr,
        seq_lens_ptr,
        tl.program_id(0),
        num_reqs,
        window,
        more,
        min_tiles,
        BLOCK_Q,
        TILE,
        True,
    )
    if (req < 0) | (split > 0):
        return
    query_start = tl.load(query_start_loc_ptr + req)
    query_len = tl.load(query_start_loc_ptr + req + 1) - query_start
    rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_PADDED)
    token_in_req = block * BLOCK_Q + rows // GROUP_SIZE
    row_mask = (token_in_req < query_len) & (rows < BLOCK_Q * GROUP_SIZE)
    tile_mask = row_mask[:, None] & (dims < HEAD_SIZE)[None, :]
    # Finite, so that a row that has seen nothing yet subtracts no infinities.
    highest = tl.full([ROWS], -3.0e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    merged = tl.zeros([ROWS, HEAD_PADDED], tl.float32)
    for number in range(0, num_splits):
        part = (slot + number).to(tl.int64) * tl.num_programs(1) + kv_head
        at_row = part * BLOCK_M + rows
        lse = tl.load(part_lse_ptr + at_row, mask=row_mask, other=float("-inf"))
        # [ROWS, HEAD_PADDED]
        values = tl.load(
            parts_ptr + (at_row * HEAD_PADDED)[:, None] + dims[None, :], mask=tile_mask, other=0.0
        )
        higher = tl.maximum(highest, lse)
        decay, weight = tl.exp2(highest - higher), tl.exp2(lse - higher)
        merged = merged * decay[:, None] + values * weight[:, None]
        total = total * decay + weight
        highest = higher
    merged /= tl.where(total == 0.0, 1.0, total)[:, None]
    token = (query_start + token_in_req).to(tl.int64)
    head = kv_head * GROUP_SIZE + rows % GROUP_SIZE
    tl.store(
        output_ptr
        + (token * output_token_stride + head * output_head_stride)[:, None]
        + dims[None, :],
        merged.to(output_ptr.dtype.element_ty),
        mask=tile_mask,
    )


def launch_config(
    dtype: torch.dtype, head_size: int, group_size: int, max_query_len: int, capability: int = 9
) -> dict[str, int]:
    """Tile sizes and launch options, chosen to keep the accumulators in registers.

    `tests/kernels` compiles them for Ampere, Hopper and Blackwell: nothing spills.

    Args:
        dtype: of queries and cache.
        head_size: before padding.
        group_size: query heads per KV head.
        max_query_len: longest request of the batch.
        capability: major compute capability of the device.

    Returns:
        `BLOCK_M`, `TILE`, `num_warps`, `num_stages`.
    """
    wide = head_size > 128
    if dtype == torch.float32:
        # Without tensor cores the operands of a dot live in registers.
        most_rows, tile, num_warps = (32 if head_size <= 64 else 16), 16, 4
    elif wide:
        most_rows, tile, num_warps = 64, 32, 8
    else:
        most_rows, tile, num_warps = 64, 64, 4
    rows = triton.next_power_of_2(max(max_query_len, 1) * group_size)
    block_m = max(16, triton.next_power_of_2(group_size), min(rows, most_rows))
    if wide and block_m == 16:
        num_warps = 4
    # Three stages: block numbers, keys and values, arithmetic.
    num_stages = 3
    if capability < 9:
        # Ampere's dot products keep their operands in registers.
        num_stages = 2 if wide else 3
        tile = tile if head_size <= 64 else min(tile, 32)
    return {"BLOCK_M": block_m, "TILE": tile, "num_warps": num_warps, "num_stages": num_stages}


def tree_attention_triton(
    # [num_tokens, num_q_heads, head_size]
    query: torch.Tensor,
    # [num_blocks, block_size, num_kv_heads, head_size]
    key_cache: torch.Tensor,
    # [num_blocks, block_size, num_kv_heads, head_size]
    value_cache: torch.Tensor,
    # [num_tokens, num_q_heads, head_size]
    output: torch.Tensor,
    # [num_reqs + 1]
    query_start_loc: torch.Tensor,
    # [num_reqs]
    seq_lens: torch.Tensor,
    # [num_reqs, max_num_blocks]
    block_table: torch.Tensor,
    # [num_tokens]
    visible_until: torch.Tensor,
    # [num_tokens]
    tree_mask: torch.Tensor,
    scale: float,
    max_query_len: int,
    softcap: float = 0.0,
    window: int = 0,
    # [1] each
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    # [num_q_heads]
    sinks: torch.Tensor | None = None,
    min_tiles: int = MIN_TILES,
) -> None:
    """Launch the kernels; never waits for the device. Arguments as `tree_attention`.

    Args:
        min_tiles: the fewest tiles of keys in a part of a request.
    """
    num_tokens, num_q_heads, head_size = query.shape
    num_reqs = seq_lens.shape[0]
    num_kv_heads = key_cache.shape[2]
    group_size = num_q_heads // num_kv_heads
    # Interpreted on the CPU, the kernel runs with any configuration.
    capability = torch.cuda.get_device_capability(query.device)[0] if query.is_cuda else 9
    config = launch_config(query.dtype, head_size, group_size, max_query_len, capability)
    block_m, block_q = config["BLOCK_M"], config["BLOCK_M"] // group_size
    # sum_r ceil(len_r / block_q) <= num_tokens // block_q + num_reqs, without knowing the lengths.
    num_query_blocks = num_tokens // block_q + num_reqs
    if num_tokens == 0 or num_reqs == 0:
        return
    head_padded = triton.next_power_of_2(head_size)
    more = triton.cdiv(MORE_PROGRAMS, num_kv_heads)
    lse = query.new_empty((2 * more, num_kv_heads, block_m), dtype=torch.float32)
    parts = query.new_empty((*lse.shape, head_padded), dtype=torch.float32)

    # tanh takes the plain score, exp2 takes it times log2(e).
    qk_scale = scale if softcap > 0 else scale * LOG2_E
    sizes = {
        "HEAD_SIZE": head_size,
        "HEAD_PADDED": head_padded,
        "GROUP_SIZE": group_size,
        "BLOCK_Q": block_q,
    }
    _tree_attention_kernel[(num_query_blocks + more, num_kv_heads)](
        output,
        parts,
        lse,
        query,
        key_cache,
        value_cache,
        query_start_loc,
        seq_lens,
        block_table,
        visible_until,
        tree_mask,
        key_scale,
        value_scale,
        sinks,
        qk_scale,
        float(softcap),
        window,
        num_reqs,
        more,
        min_tiles,
        block_table.stride(0),
        *query.stride()[:2],
        *output.stride()[:2],
        *key_cache.stride(),
        *value_cache.stride(),
        BLOCK_SIZE=key_cache.shape[1],
        USE_SOFTCAP=softcap > 0,
        USE_WINDOW=window > 0,
        **sizes,
        **config,
    )
    _merge_splits_kernel[(2 * more, num_kv_heads, triton.cdiv(block_m, MERGED_ROWS))](
        output,
        parts,
        lse,
        query_start_loc,
        seq_lens,
        num_reqs,
        window,
        more,
        min_tiles,
        *output.stride()[:2],
        BLOCK_M=block_m,
        TILE=config["TILE"],
        ROWS=MERGED_ROWS,
        **sizes,
    )
