# SPDX-License-Identifier: Apache-2.0
"""Host kernels of the sampler: temperature, min-p, Gumbel sampling and logprobs.

Their work grows with `num_rows * vocab_size`, so they are torch operations, which use all cores and
take logits of any dtype.
"""

from typing import Any

import numpy as np
import torch

from vllm_spechub.cpu.vllm_kernels.gumbel import DRAFT_NOISE_SALT, gumbel_noise
from vllm_spechub.cpu.vllm_kernels.segments import ragged_index


def temperature(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    _logits_stride: int,
    # [num_rows]
    expanded_idx_mapping: torch.Tensor,
    # [max_num_reqs]
    temperatures: torch.Tensor,
    _vocab_size: int,
    **_launch: Any,
) -> None:
    """Stand-in for `sample.gumbel._temperature_kernel`."""
    divisors = temperatures[expanded_idx_mapping].float()
    logits.div_(divisors.masked_fill_(divisors == 0, 1)[:, None])


def gumbel_sample(
    # [num_rows, num_blocks]
    local_argmax: torch.Tensor,
    _local_argmax_stride: int,
    # [num_rows, num_blocks]
    local_max: torch.Tensor,
    _local_max_stride: int,
    # [max_num_reqs, num_cols, cache_vocab_size]
    logits_cache: torch.Tensor | None,
    _logits_cache_stride_0: int,
    _logits_cache_stride_1: int,
    # [] or [num_rows]
    logits_cache_col: torch.Tensor | None,
    # [num_rows, vocab_size]
    logits_cache_source: torch.Tensor | None,
    _logits_cache_source_stride: int,
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    _logits_stride: int,
    # [num_rows], -1 for a row without a request
    expanded_idx_mapping: torch.Tensor,
    # [max_num_reqs]
    seeds: torch.Tensor,
    # [num_rows]
    pos: torch.Tensor,
    # [max_num_reqs]
    temperatures: torch.Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
    IS_DRAFTING: bool,
    APPLY_TEMPERATURE: bool,
    USE_FP64: bool,
    PER_TOKEN_COL: bool,
    noise_by_column: bool = False,
    **_launch: Any,
) -> None:
    """Stand-in for `sample.gumbel._gumbel_sample_kernel`.

    Args:
        noise_by_column: whether the noise depends on the column of the cache, too.
    """
    num_rows, num_blocks = local_max.shape
    idx = expanded_idx_mapping.long()
    is_real = idx >= 0
    temps = temperatures[idx].float().masked_fill_(~is_real, 0.0)

    row_seeds = seeds[idx]
    if logits_cache is not None:
        assert logits_cache_col is not None
        assert logits_cache_source is not None
        # Cached before temperature is applied, so that the cache can have the model's dtype.
        cols = logits_cache_col if PER_TOKEN_COL else logits_cache_col.expand(num_rows)
        cached = logits_cache_source[is_real, :vocab_size]
        logits_cache[idx[is_real], cols[is_real].long(), :vocab_size] = cached
        if noise_by_column:
            row_seeds = row_seeds ^ (cols.long() << 32)

    # The last block is padded with -inf, which never wins.
    scores = logits.new_full((num_rows, num_blocks * BLOCK_SIZE), float("-inf"), dtype=torch.float)
    scores[:, :vocab_size] = logits[:, :vocab_size]
    if APPLY_TEMPERATURE:
        scores.div_(temps.masked_fill(temps == 0, 1)[:, None])
    if USE_FP64:
        scores = scores.double()
    sampled = temps.nonzero().view(-1)
    if sampled.numel() > 0:
        at = pos[sampled].long() + (DRAFT_NOISE_SALT if IS_DRAFTING else 0)
        noise = gumbel_noise(row_seeds[sampled], at, vocab_size, USE_FP64)
        scores[:, :vocab_size].index_add_(0, sampled, noise)

    values, offsets = scores.view(num_rows, num_blocks, BLOCK_SIZE).max(dim=-1)
    local_max.copy_(values)
    local_argmax.copy_(offsets + torch.arange(num_blocks) * BLOCK_SIZE)


def min_p(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    _logits_stride: int,
    # [num_rows]
    expanded_idx_mapping: torch.Tensor,
    # [max_num_reqs]
    min_ps: torch.Tensor,
    _vocab_size: int,
    **_launch: Any,
) -> None:
    """Stand-in for `sample.min_p._min_p_kernel`."""
    # A min-p of 0 has a threshold of -inf, which masks nothing.
    thresholds = logits.amax(dim=-1).float() + min_ps[expanded_idx_mapping].float().log()
    logits.masked_fill_(logits < thresholds[:, None], float("-inf"))


def topk_log_softmax(
    # [num_rows, topk]
    output: torch.Tensor,
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    _logits_stride: int,
    # [num_rows, topk]
    topk_ids: torch.Tensor,
    _topk_ids_stride: int,
    topk: int,
    _vocab_size: int,
    **_launch: Any,
) -> None:
    """Stand-in for `sample.logprob._topk_log_softmax_kernel`."""
    shifted = logits - logits.amax(dim=-1, keepdim=True).float()
    log_sum = shifted.exp().sum(dim=-1, keepdim=True).log_()
    output.copy_(shifted.gather(1, topk_ids[:, :topk]).sub_(log_sum))


def ranks(
    # [num_rows]
    output: torch.Tensor,
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    _logits_stride: int,
    # [num_rows]
    token_ids: torch.Tensor,
    _vocab_size: int,
    **_launch: Any,
) -> None:
    """Stand-in for `sample.logprob._ranks_kernel`."""
    chosen = logits.gather(1, token_ids.long()[:, None])
    output.copy_((logits >= chosen).sum(dim=-1))


def fill_logprob_token_ids(
    # [num_rows, 1 + num_cols]
    out_token_ids: torch.Tensor,
    _out_token_ids_stride: int,
    # [num_rows, 1 + num_cols]
    out_valid_mask: torch.Tensor,
    _out_valid_mask_stride: int,
    # [num_rows]
    sampled_token_ids: torch.Tensor,
    # [num_rows, NUM_TOPK], not read when NUM_TOPK is 0
    topk_indices: torch.Tensor,
    _topk_indices_stride: int,
    # [num_rows]
    expanded_idx_mapping: torch.Tensor,
    # [max_num_reqs]
    num_per_req_token_ids: torch.Tensor,
    # [max_num_reqs, max_num_token_ids]
    per_req_token_ids: torch.Tensor,
    _per_req_token_ids_stride: int,
    NUM_TOPK: int,
    **_launch: Any,
) -> None:
    """Stand-in for `sample.logprob._fill_logprob_token_ids_kernel`."""
    token_ids, valid = out_token_ids.numpy(), out_valid_mask.numpy()
    token_ids[:, 0] = sampled_token_ids.numpy()
    valid[:, 0] = True

    idx = expanded_idx_mapping.numpy()
    num_custom = num_per_req_token_ids.numpy()[idx]
    rows, cols = ragged_index(num_custom)
    token_ids[rows, 1 + cols] = per_req_token_ids.numpy()[idx[rows], cols]
    valid[rows, 1 + cols] = True
    plain = num_custom == 0
    if NUM_TOPK > 0:
        token_ids[plain, 1 : 1 + NUM_TOPK] = topk_indices.numpy()[plain, :NUM_TOPK]
        valid[plain, 1 : 1 + NUM_TOPK] = True


def prompt_logprobs_token_ids(
    # [num_tokens]
    token_ids: torch.Tensor,
    # [num_reqs + 1]
    query_start_loc: torch.Tensor,
    # [num_reqs]
    idx_mapping: torch.Tensor,
    # [max_num_reqs]
    num_computed_tokens: torch.Tensor,
    # [max_num_reqs, max_model_len]
    all_token_ids: torch.Tensor,
    _all_token_ids_stride: int,
    **_launch: Any,
) -> None:
    """Stand-in for `sample.prompt_logprob._prompt_logprobs_token_ids_kernel`."""
    idx = idx_mapping.numpy()
    starts = query_start_loc.numpy()[: idx.size + 1]
    rows, offsets = ragged_index(starts[1:] - starts[:-1])
    targets = num_computed_tokens.numpy()[idx][rows] + 1 + offsets
    # A full context has no next token; vLLM drops the logprob of the one that is taken instead.
    np.minimum(targets, all_token_ids.shape[1] - 1, out=targets)
    token_ids.numpy()[starts[0] : starts[-1]] = all_token_ids.numpy()[idx[rows], targets]


def num_nans(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    _logits_stride: int,
    # [num_rows]
    output: torch.Tensor,
    _vocab_size: int,
    **_launch: Any,
) -> None:
    """Stand-in for `metrics.logits._num_nans_kernel`."""
    output.copy_(logits.isnan().sum(dim=-1))
