# SPDX-License-Identifier: Apache-2.0
"""Host kernels of the batch's bookkeeping: block tables, staged writes and model inputs.

They run on every step over a handful of requests, where the number of calls costs time and the
number of elements hardly does. So they work on numpy views, which share memory with the tensors and
are faster to index. Row strides that vLLM's kernels take as arguments are in the views already.
"""

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np
import torch


@lru_cache(maxsize=1024)
def _table_at(address: int, num_rows: int, num_cols: int) -> np.ndarray:
    """A view of the int32 table `[num_rows, num_cols]` at `address`.

    The view owns no memory, so a cached view is valid as long as the address is.
    """
    cells = (ctypes.c_int32 * (num_rows * num_cols)).from_address(address)
    return np.ctypeslib.as_array(cells).reshape(num_rows, num_cols)


def gather_block_tables(
    # [num_reqs], batch index to request slot
    idx_mapping: torch.Tensor,
    # [num_groups], addresses of [max_num_reqs, num_cols]
    src_table_ptrs: torch.Tensor,
    # [num_groups], addresses of [max_num_reqs, num_cols]
    dst_table_ptrs: torch.Tensor,
    # [num_groups]
    table_strides: torch.Tensor,
    # [num_groups, max_num_reqs]
    num_blocks: torch.Tensor,
    _num_blocks_stride: int,
    num_reqs: int,
    **_launch: Any,
) -> None:
    """Stand-in for `block_table._gather_block_tables_kernel`.

    All rows past the batch are zeroed: only the launch grid, which a stand-in does not see, tells
    how many of them are padding.
    """
    idx = idx_mapping.numpy()
    blocks = num_blocks.numpy()
    max_num_reqs = blocks.shape[1]
    tables = zip(
        src_table_ptrs.tolist(), dst_table_ptrs.tolist(), table_strides.tolist(), strict=True
    )
    for group, (src_ptr, dst_ptr, num_cols) in enumerate(tables):
        src = _table_at(src_ptr, max_num_reqs, num_cols)
        dst = _table_at(dst_ptr, max_num_reqs, num_cols)
        used = blocks[group].take(idx)
        width = int(used.max(initial=0))
        np.copyto(
            dst[:num_reqs, :width],
            src[idx, :width],
            where=np.arange(width) < used[:, None],
        )
        dst[num_reqs:] = 0


def clear_blocks_before_windows(
    # [num_groups], addresses of [max_num_reqs, num_cols]
    table_ptrs: torch.Tensor,
    # [num_groups]
    table_strides: torch.Tensor,
    max_num_reqs: int,
    # [num_reqs], the position of each request's first scheduled token
    first_positions: torch.Tensor,
    # [num_groups], how far before that position a window reaches; 0 without a window
    window_reach: torch.Tensor,
    # [num_groups]
    block_sizes: torch.Tensor,
) -> None:
    """Write 0 for every block that no token of the batch can see, because it ends before the
    windows of its request's tokens."""
    first = first_positions.numpy()
    groups = zip(
        table_ptrs.tolist(),
        table_strides.tolist(),
        window_reach.tolist(),
        block_sizes.tolist(),
        strict=True,
    )
    for table_ptr, num_cols, reach, block_size in groups:
        if reach > 0:
            unseen = np.maximum(first - reach, 0) // block_size
            table = _table_at(table_ptr, max_num_reqs, num_cols)[: first.size]
            table[np.arange(num_cols) < unseen[:, None]] = 0


def compute_slot_mappings(
    max_num_tokens: int,
    # [num_reqs], batch index to request slot, -1 for a request that owns no blocks
    idx_mapping: torch.Tensor,
    # [num_reqs + 1]
    query_start_loc: torch.Tensor,
    # [num_tokens]
    pos: torch.Tensor,
    # [num_groups], addresses of [max_num_reqs, num_cols]
    table_ptrs: torch.Tensor,
    # [num_groups]
    table_strides: torch.Tensor,
    # [num_groups]
    block_sizes: torch.Tensor,
    # [num_groups]
    slot_mapping_enabled: torch.Tensor,
    # [num_groups]
    dcp_sharded: torch.Tensor,
    # [num_groups, max_num_tokens]
    slot_mappings: torch.Tensor,
    _slot_mappings_stride: int,
    cp_rank: int,
    CP_SIZE: int,
    CP_INTERLEAVE: int,
    PAD_ID: int,
    **_launch: Any,
) -> None:
    """Stand-in for `block_table._compute_slot_mappings_kernel`."""
    idx = idx_mapping.numpy()
    starts = query_start_loc.numpy()[: idx.size + 1]
    first, last = int(starts[0]), int(starts[-1])
    owner = np.repeat(idx, starts[1:] - starts[:-1])
    positions = pos.numpy()[first:last]
    out = slot_mappings.numpy()
    # Rows past the highest slot in use are never read, so the table may end there.
    num_rows = max(int(idx.max(initial=0)), 0) + 1
    all_real = int(idx.min(initial=0)) >= 0

    groups = zip(
        table_ptrs.tolist(),
        table_strides.tolist(),
        block_sizes.tolist(),
        slot_mapping_enabled.tolist(),
        dcp_sharded.tolist(),
        strict=True,
    )
    for group, (table_ptr, num_cols, block_size, enabled, sharded) in enumerate(groups):
        row = out[group, :max_num_tokens]
        row[last:] = PAD_ID
        if not enabled:
            row[first:last] = PAD_ID
            continue
        local, is_local = positions, None
        if CP_SIZE != 1 and sharded:
            local, is_local = _shard_positions(
                positions, block_size, cp_rank, CP_SIZE, CP_INTERLEAVE
            )
        block, offset = np.divmod(local, block_size)
        # Clipped, because a position past the table would otherwise raise an error; vLLM's kernel
        # reads whatever lies there.
        number = (
            _table_at(table_ptr, num_rows, num_cols)
            .reshape(-1)
            .take(owner * num_cols + block, mode="clip")
        )
        slots = offset + number.astype(np.int64) * block_size
        if is_local is not None:
            slots[~is_local] = PAD_ID
        if not all_real:
            slots[owner < 0] = PAD_ID
        row[first:last] = slots


def _shard_positions(
    # [num_tokens]
    positions: np.ndarray,
    block_size: int,
    cp_rank: int,
    cp_size: int,
    cp_interleave: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Positions in this rank's share of the cache, and which tokens are in that share."""
    block, offset = np.divmod(positions, block_size * cp_size)
    is_local = offset // cp_interleave % cp_size == cp_rank
    rounds = offset // (cp_interleave * cp_size)
    local = block * block_size + rounds * cp_interleave + offset % cp_interleave
    return local, is_local


def apply_write(
    # [num_rows, ...]; with MULTI_GROUP [num_groups], addresses of int32 tables
    output: torch.Tensor,
    # with MULTI_GROUP [num_groups]
    output_stride: int | torch.Tensor,
    # [num_writes]
    write_indices: torch.Tensor,
    # [num_writes]
    write_starts: torch.Tensor,
    # [num_elements]
    write_contents: torch.Tensor,
    # [num_writes]
    write_cu_lens: torch.Tensor,
    # [num_writes], None without MULTI_GROUP
    write_group_ids: torch.Tensor | None,
    MULTI_GROUP: bool,
    **_launch: Any,
) -> None:
    """Stand-in for `buffer_utils._apply_write_kernel`."""
    if MULTI_GROUP:
        assert isinstance(output_stride, torch.Tensor)
        assert write_group_ids is not None
        _apply_grouped_write(
            output.tolist(),
            output_stride.tolist(),
            write_indices.tolist(),
            write_starts.tolist(),
            write_contents,
            write_cu_lens.tolist(),
            write_group_ids.tolist(),
        )
        return
    ends = write_cu_lens.numpy()
    counts = np.diff(ends, prepend=0)
    rows = np.repeat(write_indices.numpy(), counts)
    contents = write_contents.numpy()[: rows.size]
    cols = np.arange(rows.size) + np.repeat(write_starts.numpy() - ends + counts, counts)
    if output.dim() == 1:
        output.numpy()[rows + cols] = contents
    else:
        output.numpy()[rows, cols] = contents


def _apply_grouped_write(
    ptrs: list[int],
    strides: list[int],
    indices: list[int],
    starts: list[int],
    # [num_elements], int32
    contents: torch.Tensor,
    ends: list[int],
    group_ids: list[int],
) -> None:
    """Write into the tables of several groups, of which only the addresses are known."""
    source = contents.data_ptr()
    item = contents.element_size()
    begin = 0
    for group, row, start, end in zip(group_ids, indices, starts, ends, strict=True):
        target = ptrs[group] + item * (row * strides[group] + start)
        ctypes.memmove(target, source + item * begin, item * (end - begin))
        begin = end


def prepare_prefill_inputs(
    # [num_tokens]
    input_ids: torch.Tensor,
    # [num_lookahead, max_num_reqs]
    next_prefill_tokens: torch.Tensor,
    _next_prefill_tokens_stride: int,
    num_lookahead: int,
    # [num_reqs]
    idx_mapping: torch.Tensor,
    # [num_reqs + 1]
    query_start_loc: torch.Tensor,
    # [max_num_reqs, max_model_len]
    all_token_ids: torch.Tensor,
    _all_token_ids_stride: int,
    # [max_num_reqs]
    prefill_lens: torch.Tensor,
    # [max_num_reqs]
    num_computed_tokens: torch.Tensor,
    **_launch: Any,
) -> None:
    """Stand-in for `input_batch._prepare_prefill_inputs_kernel`."""
    idx = idx_mapping.numpy()
    computed = num_computed_tokens.numpy().take(idx)
    prefill = prefill_lens.numpy().take(idx)
    prefilling = (computed < prefill).nonzero()[0]
    if prefilling.size == 0:
        return
    starts = query_start_loc.numpy()
    ids = input_ids.numpy()
    tokens = all_token_ids.numpy()
    lookahead = next_prefill_tokens.numpy()
    # A loop is fast here: each prompt chunk is one stretch of memory, and few requests have one.
    for i in prefilling.tolist():
        row = tokens[idx[i]]
        begin, end = int(starts[i]), int(starts[i + 1])
        done = int(computed[i])
        reached = done + end - begin
        ids[begin:end] = row[done:reached]
        upcoming = row[reached : min(reached + num_lookahead, int(prefill[i]))]
        lookahead[: upcoming.size, idx[i]] = upcoming
        lookahead[upcoming.size : num_lookahead, idx[i]] = 0


def prepare_pos_seq_lens(
    # [num_tokens]
    pos: torch.Tensor,
    # [max_num_reqs]
    seq_lens: torch.Tensor,
    # [num_reqs]
    idx_mapping: torch.Tensor,
    # [num_reqs + 1]
    query_start_loc: torch.Tensor,
    # [max_num_reqs]
    num_computed_tokens: torch.Tensor,
    max_num_reqs: int,
    **_launch: Any,
) -> None:
    """Stand-in for `input_batch._prepare_pos_seq_lens_kernel`."""
    idx = idx_mapping.numpy()
    starts = query_start_loc.numpy()[: idx.size + 1]
    counts = starts[1:] - starts[:-1]
    computed = num_computed_tokens.numpy().take(idx)
    lens = seq_lens.numpy()
    np.add(computed, counts, out=lens[: idx.size])
    lens[idx.size : max_num_reqs] = 0
    first, last = int(starts[0]), int(starts[-1])
    pos.numpy()[first:last] = np.arange(first, last) + np.repeat(computed - starts[:-1], counts)


def combine_sampled_and_draft_tokens(
    # [num_tokens]
    input_ids: torch.Tensor,
    # [num_reqs]
    idx_mapping: torch.Tensor,
    # [max_num_reqs] or [max_num_reqs, 1]
    last_sampled_tokens: torch.Tensor,
    # [num_reqs + 1]
    query_start_loc: torch.Tensor,
    # [num_reqs]
    seq_lens: torch.Tensor,
    # [max_num_reqs]
    prefill_len: torch.Tensor,
    # [max_num_reqs, num_speculative_steps]
    draft_tokens: torch.Tensor,
    _draft_tokens_stride: int,
    # [num_reqs + 1]
    cu_num_logits: torch.Tensor,
    # [num_logits]
    logits_indices: torch.Tensor,
    NUM_NEW_SAMPLED_TOKENS: int = 1,
    **_launch: Any,
) -> None:
    """Stand-in for `input_batch._combine_sampled_and_draft_tokens_kernel`."""
    idx = idx_mapping.numpy()
    num_reqs = idx.size
    bounds = cu_num_logits.numpy()[: num_reqs + 1]
    counts = bounds[1:] - bounds[:-1]
    first_slots = query_start_loc.numpy()[1 : num_reqs + 1] - counts
    rows = np.repeat(np.arange(num_reqs), counts)
    begin, end = int(bounds[0]), int(bounds[-1])
    local = np.arange(begin, end) - bounds.take(rows)
    slots = first_slots.take(rows) + local
    logits_indices.numpy()[begin:end] = slots

    lens = seq_lens.numpy()[:num_reqs]
    prefill = prefill_len.numpy().take(idx)
    past_prefill = lens > prefill
    if not past_prefill.any():
        return
    ids = input_ids.numpy()
    if NUM_NEW_SAMPLED_TOKENS > 0:
        # A first logit that is still in the prompt has the prompt's token as its input.
        rewrites = past_prefill & (lens - counts >= prefill)
        last_sampled = last_sampled_tokens.numpy().reshape(-1)
        ids[first_slots[rewrites]] = last_sampled[idx[rewrites]]
    drafted = past_prefill.take(rows) & (local >= NUM_NEW_SAMPLED_TOKENS)
    ids[slots[drafted]] = draft_tokens.numpy()[
        idx.take(rows[drafted]), local[drafted] - NUM_NEW_SAMPLED_TOKENS
    ]


def get_num_sampled_and_rejected(
    # [num_reqs]
    num_sampled: torch.Tensor,
    # [num_reqs]
    num_rejected: torch.Tensor,
    # [num_reqs]
    seq_lens: torch.Tensor,
    # [num_reqs + 1]
    cu_num_logits: torch.Tensor,
    # [num_reqs]
    idx_mapping: torch.Tensor,
    # [max_num_reqs]
    prefill_len: torch.Tensor,
    **_launch: Any,
) -> None:
    """Stand-in for `input_batch._get_num_sampled_and_rejected_kernel`."""
    idx = idx_mapping.numpy()
    num_reqs = idx.size
    generating = seq_lens.numpy()[:num_reqs] >= prefill_len.numpy().take(idx)
    bounds = cu_num_logits.numpy()
    sampled = num_sampled.numpy()[:num_reqs]
    sampled *= generating
    num_logits = bounds[1 : num_reqs + 1] - bounds[:num_reqs]
    num_rejected.numpy()[:num_reqs] = (num_logits - sampled) * generating


def post_update(
    # [num_reqs], negative to skip a request
    idx_mapping: torch.Tensor,
    # [max_num_reqs]
    num_computed_tokens: torch.Tensor,
    # [max_num_reqs] or [max_num_reqs, 1]
    last_sampled_tokens: torch.Tensor,
    # [max_num_reqs, vocab_size]
    output_bin_counts: torch.Tensor | None,
    _output_bin_counts_stride: int,
    # [num_reqs, num_speculative_steps + 1]
    sampled_tokens: torch.Tensor,
    _sampled_tokens_stride: int,
    # [num_reqs]
    num_sampled: torch.Tensor,
    # [num_reqs]
    num_rejected: torch.Tensor,
    # [num_reqs + 1]
    query_start_loc: torch.Tensor | None,
    # [max_num_reqs, max_model_len]
    all_token_ids: torch.Tensor,
    _all_token_ids_stride: int,
    # [max_num_reqs]
    total_len: torch.Tensor,
    **_launch: Any,
) -> None:
    """Stand-in for `input_batch._post_update_kernel`."""
    idx = idx_mapping.numpy()
    num_reqs = idx.size
    counts = num_sampled.numpy()[:num_reqs]
    sampled = sampled_tokens.numpy()[:num_reqs]
    advance = -num_rejected.numpy()[:num_reqs]
    if query_start_loc is not None:
        starts = query_start_loc.numpy()[: num_reqs + 1]
        advance += starts[1:] - starts[:-1]
    if int(idx.min(initial=0)) < 0:
        kept = idx >= 0
        idx, counts, sampled, advance = idx[kept], counts[kept], sampled[kept], advance[kept]

    num_computed_tokens.numpy()[idx] += advance
    rows, cols = (np.arange(sampled.shape[1]) < counts[:, None]).nonzero()
    if rows.size == 0:
        return
    lens = total_len.numpy()
    ends = lens.take(idx)
    tokens = sampled[rows, cols]
    slots = idx.take(rows)
    all_token_ids.numpy()[slots, ends.take(rows) + cols] = tokens
    # A request's tokens are in order, so its last one is what remains.
    last_sampled_tokens.numpy().reshape(-1)[slots] = tokens
    lens[idx] = ends + counts
    if output_bin_counts is not None:
        np.add.at(output_bin_counts.numpy(), (slots, tokens), 1)


def post_update_num_computed_tokens(
    # [num_reqs]
    idx_mapping: torch.Tensor,
    # [max_num_reqs]
    num_computed_tokens: torch.Tensor,
    # [num_reqs + 1]
    query_start_loc: torch.Tensor,
    **_launch: Any,
) -> None:
    """Stand-in for `input_batch._post_update_num_computed_tokens_kernel`."""
    idx = idx_mapping.numpy()
    starts = query_start_loc.numpy()[: idx.size + 1]
    num_computed_tokens.numpy()[idx] += starts[1:] - starts[:-1]


def expand_idx_mapping(
    # [num_reqs]
    idx_mapping: torch.Tensor,
    # [num_logits]
    expanded_idx_mapping: torch.Tensor,
    # [num_logits]
    expanded_local_pos: torch.Tensor,
    # [num_reqs + 1]
    cu_num_logits: torch.Tensor,
    **_launch: Any,
) -> None:
    """Stand-in for `input_batch._expand_idx_mapping_kernel`."""
    idx = idx_mapping.numpy()
    bounds = cu_num_logits.numpy()[: idx.size + 1]
    counts = bounds[1:] - bounds[:-1]
    begin, end = int(bounds[0]), int(bounds[-1])
    expanded_idx_mapping.numpy()[begin:end] = np.repeat(idx, counts)
    np.subtract(
        np.arange(begin, end),
        np.repeat(bounds[:-1], counts),
        out=expanded_local_pos.numpy()[begin:end],
    )


def prepare_rope_positions(
    # [num_dims, max_num_tokens + 1]
    positions: torch.Tensor,
    _positions_stride: int,
    # [max_num_reqs * num_dims, max_model_len], of the tokens that requests came with
    prefill_positions: torch.Tensor,
    _prefill_stride0: int,
    max_model_len: int,
    # [max_num_reqs], what positions after those exceed slots by
    prefill_delta: torch.Tensor,
    # [num_reqs]
    idx_mapping: torch.Tensor,
    # [num_reqs + 1]
    query_start_loc: torch.Tensor,
    # [max_num_reqs]
    prefill_lens: torch.Tensor,
    # [max_num_reqs]
    num_computed_tokens: torch.Tensor,
    BLOCK_SIZE: int,
    NUM_DIMS: int,
) -> None:
    """Stand-in for `mm.rope._prepare_rope_positions_kernel`."""
    out, bounds = positions.numpy(), query_start_loc.tolist()
    known = prefill_positions.numpy().reshape(-1, NUM_DIMS, max_model_len)
    for i, req in enumerate(idx_mapping.tolist()):
        first, start, end = int(num_computed_tokens[req]), bounds[i], bounds[i + 1]
        if first < int(prefill_lens[req]):
            found = known[req, :, first : first + end - start]
            # placeholders below the last token of a prompt may exceed the longest text
            out[:, start : start + found.shape[1]] = found
        else:
            first += int(prefill_delta[req])
            out[:, start:end] = np.arange(first, first + end - start)
