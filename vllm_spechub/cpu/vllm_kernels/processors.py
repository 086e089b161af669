# SPDX-License-Identifier: Apache-2.0
"""Host kernels of the logits processors: penalties, biases, bad words, thinking budgets, grammars.

Each of them runs only if a request asks for it. If a token's history counts, the drafted tokens
before it are part of that history: `input_ids` holds them, laid out like the rows of logits, with
the last committed token first.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from vllm_spechub.cpu.vllm_kernels.segments import ragged_index

_FORCED_LOGIT = 1.0e9


def penalties(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    _logits_stride: int,
    # [num_rows]
    expanded_idx_mapping: torch.Tensor,
    # [num_rows]
    token_ids: torch.Tensor,
    # [num_rows]
    expanded_local_pos: torch.Tensor,
    # [max_num_reqs]
    repetition_penalty: torch.Tensor,
    # [max_num_reqs]
    frequency_penalty: torch.Tensor,
    # [max_num_reqs]
    presence_penalty: torch.Tensor,
    # [max_num_reqs, ceil(vocab_size / 32)]
    prompt_bin_mask: torch.Tensor,
    _prompt_bin_mask_stride: int,
    # [max_num_reqs, vocab_size]
    output_bin_counts: torch.Tensor,
    _output_bin_counts_stride: int,
    vocab_size: int,
    **_launch: Any,
) -> None:
    """Stand-in for `sample.penalties._penalties_kernel`."""
    idx = expanded_idx_mapping.long()
    repetition, frequency, presence = (
        penalty[idx] for penalty in (repetition_penalty, frequency_penalty, presence_penalty)
    )
    rows = ((repetition != 1) | (frequency != 0) | (presence != 0)).nonzero().view(-1)
    idx = idx[rows]
    repetition, frequency, presence = (
        penalty[rows, None] for penalty in (repetition, frequency, presence)
    )

    counts = output_bin_counts[idx, :vocab_size]
    drafted_rows, offsets = ragged_index(expanded_local_pos[rows].numpy())
    firsts = (rows - expanded_local_pos[rows]).numpy()
    drafted = token_ids.numpy()[firsts[drafted_rows] + offsets + 1]
    # A placeholder for a draft is negative, and is not counted.
    known = (drafted >= 0) & (drafted < vocab_size)
    np.add.at(counts.numpy(), (drafted_rows[known], drafted[known]), 1)

    in_output = counts > 0
    in_prompt = torch.from_numpy(_unpack_bits(prompt_bin_mask[idx], vocab_size)).bool()
    values = logits[rows].float()
    scale = torch.where(in_prompt | in_output, repetition, 1.0)
    values *= torch.where(values > 0, 1.0 / scale, scale)
    values -= frequency * counts
    values -= presence * in_output
    logits[rows] = values.to(logits.dtype)


def _unpack_bits(
    # [num_rows, ceil(num_bits / 32)], int32
    packed: torch.Tensor,
    num_bits: int,
) -> np.ndarray:
    """The bits of packed masks, `[num_rows, num_bits]` uint8."""
    octets = packed.contiguous().numpy().view(np.uint8)
    return np.unpackbits(octets, axis=1, count=num_bits, bitorder="little")


def bincount(
    # [num_new_reqs]
    expanded_idx_mapping: torch.Tensor,
    # [max_num_reqs, max_model_len]
    all_token_ids: torch.Tensor,
    _all_token_ids_stride: int,
    # [max_num_reqs]
    prompt_len: torch.Tensor,
    # [max_num_reqs]
    prefill_len: torch.Tensor,
    # [max_num_reqs, ceil(vocab_size / 32)]
    prompt_bin_mask: torch.Tensor,
    _prompt_bin_mask_stride: int,
    # [max_num_reqs, vocab_size]
    output_bin_counts: torch.Tensor,
    _output_bin_counts_stride: int,
    **_launch: Any,
) -> None:
    """Stand-in for `sample.penalties._bincount_kernel`."""
    tokens = all_token_ids.numpy()
    masks = prompt_bin_mask.numpy().view(np.uint32)
    counts = output_bin_counts.numpy()
    for req in expanded_idx_mapping.tolist():
        prompt_end, prefill_end = int(prompt_len[req]), int(prefill_len[req])
        prompt = tokens[req, :prompt_end]
        bits = np.uint32(1) << (prompt % 32).astype(np.uint32)
        np.bitwise_or.at(masks[req], prompt // 32, bits)
        np.add.at(counts[req], tokens[req, prompt_end:prefill_end], 1)


def bias(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    _logits_stride: int,
    _vocab_size: int,
    # [num_rows]
    expanded_idx_mapping: torch.Tensor,
    # [max_num_reqs]
    num_allowed_token_ids: torch.Tensor,
    # [max_num_reqs, max_num_allowed]
    allowed_token_ids: torch.Tensor,
    _allowed_token_ids_stride: int,
    # [max_num_reqs]
    num_logit_bias: torch.Tensor,
    # [max_num_reqs, max_num_bias]
    bias_token_ids: torch.Tensor,
    _bias_token_ids_stride: int,
    # [max_num_reqs, max_num_bias]
    bias_values: torch.Tensor,
    _bias_stride: int,
    # [num_rows]
    pos: torch.Tensor,
    # [max_num_reqs]
    min_lens: torch.Tensor,
    # [max_num_reqs]
    num_stop_token_ids: torch.Tensor,
    # [max_num_reqs]
    restore_when_all_masked: torch.Tensor,
    # [max_num_reqs, max_num_stop]
    stop_token_ids: torch.Tensor,
    _stop_token_ids_stride: int,
    CHECK_ALL_MASKED_ROWS: bool,
    **_launch: Any,
) -> None:
    """Stand-in for `sample.logit_bias._bias_kernel`."""
    idx = expanded_idx_mapping.long()

    num_allowed = num_allowed_token_ids[idx]
    if num_allowed.any():
        rows, tokens = _listed(allowed_token_ids, idx, num_allowed)
        banned = (num_allowed > 0)[:, None].expand(logits.shape).clone()
        banned[rows, tokens] = False
        logits.masked_fill_(banned, float("-inf"))

    num_bias = num_logit_bias[idx]
    if num_bias.any():
        rows, tokens = _listed(bias_token_ids, idx, num_bias)
        _, values = _listed(bias_values, idx, num_bias)
        logits[rows, tokens] = (logits[rows, tokens] + values).to(logits.dtype)

    too_short = pos + 1 < min_lens[idx]
    num_stop = num_stop_token_ids[idx] * too_short
    if num_stop.any():
        rows, tokens = _listed(stop_token_ids, idx, num_stop)
        before = logits[rows, tokens]
        logits[rows, tokens] = float("-inf")
        if CHECK_ALL_MASKED_ROWS:
            # If a grammar allows nothing but the stop tokens, they stay.
            stuck = (logits == float("-inf")).all(dim=-1) & (restore_when_all_masked[idx] != 0)
            restored = stuck[rows] & before.isfinite()
            logits[rows[restored], tokens[restored]] = before[restored]


def _listed(
    # [max_num_reqs, max_num_entries]
    table: torch.Tensor,
    # [num_rows]
    idx: torch.Tensor,
    # [num_rows]
    counts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `counts` entries of each row's request. Returns each entry's row, and the entry."""
    rows, cols = map(torch.from_numpy, ragged_index(counts.numpy()))
    return rows, table[idx[rows], cols]


def bad_words(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    _logits_stride: int,
    # [num_rows]
    expanded_idx_mapping: torch.Tensor,
    # [max_num_reqs, max_num_tokens]
    bad_word_token_ids: torch.Tensor,
    _bad_word_token_ids_stride: int,
    # [max_num_reqs, max_num_bad_words + 1]
    bad_word_offsets: torch.Tensor,
    _bad_word_offsets_stride: int,
    # [max_num_reqs]
    num_bad_words: torch.Tensor,
    # [max_num_reqs, max_model_len]
    all_token_ids: torch.Tensor,
    _all_token_ids_stride: int,
    # [max_num_reqs]
    prompt_len: torch.Tensor,
    # [max_num_reqs]
    total_len: torch.Tensor,
    # [num_rows]
    input_ids: torch.Tensor,
    # [num_rows]
    expanded_local_pos: torch.Tensor,
    **_launch: Any,
) -> None:
    """Stand-in for `sample.bad_words._bad_words_kernel`."""
    local = expanded_local_pos.tolist()
    for row, req in enumerate(expanded_idx_mapping.tolist()):
        num_words = int(num_bad_words[req])
        if num_words == 0:
            continue
        offsets = bad_word_offsets[req, : num_words + 1].tolist()
        tokens = bad_word_token_ids[req, : offsets[-1]].tolist()
        words = [tokens[a:b] for a, b in pairwise(offsets)]
        # As much of the output as the longest word needs; a match must not reach into the prompt.
        end = int(total_len[req]) + local[row]
        begin = max(int(prompt_len[req]), end - max(map(len, words)) + 1)
        tail = _history(
            all_token_ids[req], int(total_len[req]), input_ids, row - local[row], begin, end
        )
        for *prefix, last in words:
            if len(prefix) <= len(tail) and tail[len(tail) - len(prefix) :] == prefix:
                logits[row, last] = float("-inf")


def _history(
    # [max_model_len]
    committed: torch.Tensor,
    num_committed: int,
    # [num_rows]
    input_ids: torch.Tensor,
    first_row: int,
    begin: int,
    end: int,
) -> list[int]:
    """A request's tokens from position `begin` to before `end`, committed ones before drafted."""
    # The input of the request's first row is its last committed token, of the second its first
    # draft.
    first_draft = first_row + 1 - num_committed
    drafted_from = max(begin, num_committed)
    return (
        committed[begin : min(end, num_committed)].tolist()
        + input_ids[first_draft + drafted_from : first_draft + max(end, drafted_from)].tolist()
    )


def update_committed_marker_cache(
    # [num_reqs]
    req_ids: torch.Tensor,
    # [max_num_reqs], -1 without a budget
    thinking_token_budget: torch.Tensor,
    # [max_num_reqs, max_model_len]
    all_token_ids: torch.Tensor,
    _all_token_ids_stride: int,
    # [max_num_reqs]
    total_len: torch.Tensor,
    # [max_num_reqs]
    cached_last_start: torch.Tensor,
    # [max_num_reqs]
    cached_last_end: torch.Tensor,
    # [max_num_reqs]
    cached_scan_pos: torch.Tensor,
    # [START_LEN]
    reasoning_start_token_ids: torch.Tensor,
    # [NATURAL_END_LEN]
    natural_reasoning_end_token_ids: torch.Tensor,
    START_LEN: int,
    NATURAL_END_LEN: int,
    MAX_LEN: int,
    BLOCK: int,
) -> None:
    """Stand-in for `sample.thinking_budget._update_committed_marker_cache_kernel`."""
    start_marker = reasoning_start_token_ids.numpy()
    end_marker = natural_reasoning_end_token_ids.numpy()
    for req in req_ids.tolist():
        if thinking_token_budget[req] < 0:
            continue
        length = int(total_len[req])
        tokens = all_token_ids.numpy()[req, :length]
        scan_pos = int(cached_scan_pos[req])
        last_start, last_end = int(cached_last_start[req]), int(cached_last_end[req])
        if scan_pos > length:
            scan_pos, last_start, last_end = 0, -1, -1

        if scan_pos == 0 and last_start < 0 and last_end < 0:
            # Search backwards to a block with a marker: only the later of the two markers matters.
            high = length
            while high > 0 and last_start < 0 and last_end < 0:
                low = max(high - BLOCK, 0)
                last_start = _last_match(tokens, start_marker, low, high, last_start)
                last_end = _last_match(tokens, end_marker, low, high, last_end)
                high = low
        else:
            last_start = _last_match(tokens, start_marker, scan_pos, length, last_start)
            last_end = _last_match(tokens, end_marker, scan_pos, length, last_end)

        cached_last_start[req] = last_start
        cached_last_end[req] = last_end
        cached_scan_pos[req] = max(length - (MAX_LEN - 1), 0)


def _last_match(
    # [num_tokens]
    tokens: np.ndarray,
    # [marker_len]
    marker: np.ndarray,
    begin: int,
    end: int,
    default: int,
) -> int:
    """The last start of `marker` in `tokens` from `begin` to before `end`, or `default`."""
    end = min(end, tokens.size - marker.size + 1)
    if end <= begin:
        return default
    windows = np.lib.stride_tricks.sliding_window_view(tokens, marker.size)[begin:end]
    found = (windows == marker).all(axis=1).nonzero()[0]
    return begin + int(found[-1]) if found.size else default


def thinking_budget(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    _logits_stride: int,
    # [num_rows]
    expanded_idx_mapping: torch.Tensor,
    # [max_num_reqs], -1 without a budget
    thinking_token_budget: torch.Tensor,
    # [max_num_reqs, max_model_len]
    all_token_ids: torch.Tensor,
    _all_token_ids_stride: int,
    # [max_num_reqs]
    total_len: torch.Tensor,
    # [num_rows]
    input_ids: torch.Tensor,
    # [num_rows]
    expanded_local_pos: torch.Tensor,
    # [max_num_reqs]
    cached_last_start: torch.Tensor,
    # [max_num_reqs]
    cached_last_end: torch.Tensor,
    # [START_LEN]
    reasoning_start_token_ids: torch.Tensor,
    # [NATURAL_END_LEN]
    natural_reasoning_end_token_ids: torch.Tensor,
    # [END_LEN]
    reasoning_end_token_ids: torch.Tensor,
    START_LEN: int,
    NATURAL_END_LEN: int,
    END_LEN: int,
) -> None:
    """Stand-in for `sample.thinking_budget._thinking_budget_kernel`."""
    start_marker = reasoning_start_token_ids.numpy()
    end_marker = natural_reasoning_end_token_ids.numpy()
    forced = reasoning_end_token_ids.tolist()
    local = expanded_local_pos.tolist()
    for row, req in enumerate(expanded_idx_mapping.tolist()):
        budget = int(thinking_token_budget[req])
        if budget < 0:
            continue
        committed = int(total_len[req])
        length = committed + local[row]
        # The cache does not know markers that end in a drafted token, nor a begun forced end.
        begin = max(committed - max(START_LEN, NATURAL_END_LEN, END_LEN) + 1, 0)
        tail = _history(all_token_ids[req], committed, input_ids, row - local[row], begin, length)
        tokens = np.asarray(tail)
        last_start, last_end = (
            begin + _last_match(tokens, marker, first - begin, tokens.size, cached - begin)
            for marker, first, cached in (
                (start_marker, max(committed - START_LEN + 1, 0), int(cached_last_start[req])),
                (end_marker, max(committed - NATURAL_END_LEN + 1, 0), int(cached_last_end[req])),
            )
        )
        if last_start < 0 or last_start <= last_end:
            continue
        if length - (last_start + START_LEN) < budget:
            continue
        # If a part of the forced end is already there, the next token of it is forced.
        done = max(
            size
            for size in range(min(END_LEN - 1, length) + 1)
            if tail[len(tail) - size :] == forced[:size]
        )
        logits[row, forced[done]] = _FORCED_LOGIT


def apply_grammar_bitmask(
    # [num_logits, vocab_size]
    logits: torch.Tensor,
    _logits_stride: int,
    # [num_masks], request * MASK_STRIDE + position
    logits_indices: torch.Tensor,
    # [num_reqs + 1]
    cu_num_logits: torch.Tensor,
    # [num_masks, ceil(vocab_size / 32)]
    bitmask: torch.Tensor,
    _bitmask_stride: int,
    vocab_size: int,
    MASK_STRIDE: int,
    **_launch: Any,
) -> None:
    """Stand-in for `structured_outputs._apply_grammar_bitmask_kernel`."""
    reqs, positions = np.divmod(logits_indices.numpy()[: bitmask.shape[0]], MASK_STRIDE)
    bounds = cu_num_logits.numpy()
    firsts = bounds[reqs]
    # Verification may have dropped rows that the grammar made masks for.
    active = (positions < bounds[reqs + 1] - firsts).nonzero()[0]
    rows = torch.from_numpy((firsts + positions)[active]).long()
    allowed = _unpack_bits(bitmask[torch.from_numpy(active)], vocab_size)
    logits[rows] = logits[rows].masked_fill_(torch.from_numpy(allowed == 0), float("-inf"))
