# SPDX-License-Identifier: Apache-2.0
"""vLLM 0.33."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from vllm_spechub.engine.grammar import MaskFormat
from vllm_spechub.integration.versions.record import VllmVersion

if TYPE_CHECKING:
    from vllm.v1.request import Request


def _gather_block_tables(
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
    num_blocks_stride: int,
    num_reqs: int,
    # [max_num_reqs], the position of each request's first scheduled token
    num_computed_tokens: torch.Tensor,
    # [num_groups], how far before that position a window reaches; 0 without a window
    sliding_window_reach: torch.Tensor,
    # [num_groups]
    block_sizes: torch.Tensor,
    MASK_SLIDING_WINDOW: bool,
    **_launch: Any,
) -> None:
    """Stand-in for `block_table._gather_block_tables_kernel`, which now replaces the blocks before
    a sliding window by block 0, because they may belong to another request already."""
    from vllm_spechub.cpu.vllm_kernels import batch

    batch.gather_block_tables(
        idx_mapping,
        src_table_ptrs,
        dst_table_ptrs,
        table_strides,
        num_blocks,
        num_blocks_stride,
        num_reqs,
    )
    if MASK_SLIDING_WINDOW:
        batch.clear_blocks_before_windows(
            dst_table_ptrs,
            table_strides,
            num_blocks.shape[1],
            num_computed_tokens[idx_mapping],
            sliding_window_reach,
            block_sizes,
        )


def _post_update(
    # [num_reqs], negative to skip a request
    idx_mapping: torch.Tensor,
    # [max_num_reqs]
    num_computed_tokens: torch.Tensor,
    # [max_num_reqs] or [max_num_reqs, 1]
    last_sampled_tokens: torch.Tensor,
    # [max_num_reqs, vocab_size]
    output_bin_counts: torch.Tensor | None,
    output_bin_counts_stride: int,
    # [num_reqs, num_speculative_steps + 1]
    sampled_tokens: torch.Tensor,
    sampled_tokens_stride: int,
    # [num_reqs]
    num_sampled: torch.Tensor,
    # [num_reqs]
    num_rejected: torch.Tensor,
    # [num_reqs + 1]
    query_start_loc: torch.Tensor | None,
    # [max_num_reqs, max_model_len]
    all_token_ids: torch.Tensor,
    all_token_ids_stride: int,
    # [max_num_reqs]
    total_len: torch.Tensor,
    # [num_reqs, num_speculative_steps], what another rank of a pipeline has drafted
    draft_tokens: torch.Tensor | None,
    # [max_num_reqs, num_speculative_steps]
    draft_tokens_out: torch.Tensor | None,
    _num_draft_tokens: int,
    **_launch: Any,
) -> None:
    """Stand-in for `input_batch._post_update_kernel`, which now also takes drafts over."""
    from vllm_spechub.cpu.vllm_kernels import batch

    if draft_tokens is not None and draft_tokens_out is not None:
        kept = idx_mapping >= 0
        draft_tokens_out[idx_mapping[kept]] = draft_tokens[: len(kept)][kept]
    batch.post_update(
        idx_mapping,
        num_computed_tokens,
        last_sampled_tokens,
        output_bin_counts,
        output_bin_counts_stride,
        sampled_tokens,
        sampled_tokens_stride,
        num_sampled,
        num_rejected,
        query_start_loc,
        all_token_ids,
        all_token_ids_stride,
        total_len,
    )


def _host_kernels() -> Mapping[str, Callable[..., None]]:
    from vllm_spechub.cpu.vllm_kernels import sampling

    return {
        "vllm.v1.worker.gpu.block_table._gather_block_tables_kernel": _gather_block_tables,
        "vllm.v1.worker.gpu.input_batch._post_update_kernel": _post_update,
        "vllm.v1.worker.gpu.sample.gumbel._gumbel_sample_kernel": partial(
            sampling.gumbel_sample, noise_by_column=True
        ),
    }


def _masked_while_reasoning(manager: Any, request: "Request") -> tuple[int, ...]:
    return manager._masked_reasoning_ends(request)


VERSION = VllmVersion(
    host_kernels=_host_kernels,
    mask_format=MaskFormat(fixed_rows=True, masked_while_reasoning=_masked_while_reasoning),
    refusals=lambda vllm_config: iter(()),
)
