# SPDX-License-Identifier: Apache-2.0
"""Host kernels around drafts: what a rejection sampler reads, and a standalone draft's inputs."""

from typing import Any

import numpy as np
import torch


def flatten_sampled(
    # [num_logits]
    flat_sampled: torch.Tensor,
    # [num_reqs, num_speculative_steps + 1]
    sampled: torch.Tensor,
    _sampled_stride: int,
    # [num_reqs]
    num_sampled: torch.Tensor,
    # [num_reqs + 1]
    cu_num_logits: torch.Tensor,
    **_launch: Any,
) -> None:
    """Stands for `spec_decode.rejection_sampler._flatten_sampled_kernel`."""
    counts = num_sampled.numpy()
    rows, cols = (np.arange(sampled.shape[1]) < counts[:, None]).nonzero()
    flat_sampled.numpy()[cu_num_logits.numpy().take(rows) + cols] = sampled.numpy()[rows, cols]


def gather_draft_sampled(
    # [num_logits]
    draft_sampled: torch.Tensor,
    # [num_logits]
    pos: torch.Tensor,
    # [num_tokens]
    input_ids: torch.Tensor,
    # [num_tokens]
    positions: torch.Tensor,
    # [num_logits]
    logits_indices: torch.Tensor,
    # [num_logits]
    expanded_idx_mapping: torch.Tensor,
    # [num_logits]
    expanded_local_pos: torch.Tensor,
    # [max_num_reqs]
    prefill_len: torch.Tensor,
    num_logits: int,
    **_launch: Any,
) -> None:
    """Stands for `spec_decode.rejection_sampler._gather_draft_sampled_kernel`."""
    slots = logits_indices.numpy()[:num_logits]
    local = expanded_local_pos.numpy()[:num_logits]
    prefill = prefill_len.numpy().take(expanded_idx_mapping.numpy()[:num_logits])
    at = positions.numpy().take(slots)
    tokens = input_ids.numpy().take(slots)
    # Drafts come after the first sampled token; before that their slots hold no proposals.
    tokens[(local > 0) & (at - local < prefill)] = -1
    draft_sampled.numpy()[:num_logits] = tokens
    pos.numpy()[:num_logits] = at


def prepare_standalone_prefill(
    # [num_tokens]
    target_input_ids: torch.Tensor,
    # [num_tokens]
    target_positions: torch.Tensor,
    # [max_num_reqs] or [max_num_reqs, 1]
    last_sampled: torch.Tensor,
    # [num_reqs]
    idx_mapping: torch.Tensor,
    # [num_tokens + num_reqs]
    out_input_ids: torch.Tensor,
    # [num_tokens + num_reqs]
    out_positions: torch.Tensor,
    # [max_num_reqs]
    last_token_indices: torch.Tensor,
    # [max_num_reqs + 1]
    out_query_start_loc: torch.Tensor,
    # [max_num_reqs]
    out_seq_lens: torch.Tensor,
    # [num_reqs + 1]
    query_start_loc: torch.Tensor,
    # [num_reqs]
    seq_lens: torch.Tensor,
    # [num_reqs]
    num_rejected: torch.Tensor,
    max_num_reqs: int,
    max_model_len: int,
    **_launch: Any,
) -> None:
    """Stands for `spec_decode.standalone_ar.speculator._prepare_prefill_inputs_kernel`."""
    idx = idx_mapping.numpy()
    num_reqs = idx.size
    bounds = query_start_loc.numpy()[: num_reqs + 1]
    # Every request has one slot more than its query, for the correction token.
    out_bounds = bounds + np.arange(num_reqs + 1)
    starts, out_starts = bounds[:-1], out_bounds[:-1]
    num_slots = out_bounds[1:] - out_starts
    num_valid = num_slots - 1 - num_rejected.numpy()[:num_reqs]
    begin, end = int(out_bounds[0]), int(out_bounds[-1])

    rows = np.repeat(np.arange(num_reqs), num_slots)
    offsets = np.arange(begin, end) - out_starts.take(rows)
    # The last request's extra slot may be past the input; it holds no token of the target.
    tokens = target_input_ids.numpy().take(starts.take(rows) + offsets, mode="clip")
    tokens *= offsets < num_valid.take(rows)
    corrections = out_starts + num_valid
    tokens[corrections - begin] = last_sampled.numpy().reshape(-1).take(idx)
    out_input_ids.numpy()[begin:end] = tokens
    first_positions = target_positions.numpy().take(starts)
    np.minimum(
        first_positions.take(rows) + offsets,
        max_model_len - 1,
        out=out_positions.numpy()[begin:end],
    )

    indices = last_token_indices.numpy()
    indices[:num_reqs] = corrections
    indices[num_reqs:max_num_reqs] = 0
    query_starts = out_query_start_loc.numpy()
    query_starts[: num_reqs + 1] = out_bounds
    query_starts[num_reqs + 1 : max_num_reqs + 1] = end
    lens = out_seq_lens.numpy()
    np.minimum(seq_lens.numpy()[:num_reqs] + 1, max_model_len, out=lens[:num_reqs])
    lens[num_reqs:max_num_reqs] = 0
