# SPDX-License-Identifier: Apache-2.0
"""The V2 model runner's Triton kernels, for machines without a Triton compiler.

vLLM's runner does its bookkeeping and sampling in Triton, and keeps a registry of stand-ins for
platforms without Triton. vLLM's CPU platform fills the registry for the old runner; this package
fills it for the V2 runner.
"""

from collections.abc import Callable, Mapping

from vllm_spechub.cpu.vllm_kernels import batch, processors, sampling

_GPU = "vllm.v1.worker.gpu"

HOST_KERNELS: dict[str, Callable[..., None]] = {
    f"{_GPU}.{name}": kernel
    for name, kernel in {
        "block_table._gather_block_tables_kernel": batch.gather_block_tables,
        "block_table._compute_slot_mappings_kernel": batch.compute_slot_mappings,
        "buffer_utils._apply_write_kernel": batch.apply_write,
        "input_batch._prepare_prefill_inputs_kernel": batch.prepare_prefill_inputs,
        "input_batch._prepare_pos_seq_lens_kernel": batch.prepare_pos_seq_lens,
        "input_batch._combine_sampled_and_draft_tokens_kernel": (
            batch.combine_sampled_and_draft_tokens
        ),
        "input_batch._get_num_sampled_and_rejected_kernel": batch.get_num_sampled_and_rejected,
        "input_batch._post_update_kernel": batch.post_update,
        "input_batch._post_update_num_computed_tokens_kernel": (
            batch.post_update_num_computed_tokens
        ),
        "input_batch._expand_idx_mapping_kernel": batch.expand_idx_mapping,
        "mm.rope._prepare_rope_positions_kernel": batch.prepare_rope_positions,
        "metrics.logits._num_nans_kernel": sampling.num_nans,
        "sample.bad_words._bad_words_kernel": processors.bad_words,
        "sample.gumbel._gumbel_sample_kernel": sampling.gumbel_sample,
        "sample.gumbel._temperature_kernel": sampling.temperature,
        "sample.logit_bias._bias_kernel": processors.bias,
        "sample.logprob._fill_logprob_token_ids_kernel": sampling.fill_logprob_token_ids,
        "sample.logprob._ranks_kernel": sampling.ranks,
        "sample.logprob._topk_log_softmax_kernel": sampling.topk_log_softmax,
        "sample.min_p._min_p_kernel": sampling.min_p,
        "sample.penalties._bincount_kernel": processors.bincount,
        "sample.penalties._penalties_kernel": processors.penalties,
        "sample.prompt_logprob._prompt_logprobs_token_ids_kernel": (
            sampling.prompt_logprobs_token_ids
        ),
        "sample.thinking_budget._thinking_budget_kernel": processors.thinking_budget,
        "sample.thinking_budget._update_committed_marker_cache_kernel": (
            processors.update_committed_marker_cache
        ),
        "structured_outputs._apply_grammar_bitmask_kernel": processors.apply_grammar_bitmask,
    }.items()
}
"""The stand-ins for the kernels of the oldest supported vLLM, by their qualified names."""


def register(kernels: Mapping[str, Callable[..., None]]) -> None:
    """Put host kernels in the place of vLLM's, unless there is a Triton to compile those."""
    from vllm.triton_utils import HAS_TRITON, triton
    from vllm.triton_utils.dispatcher import register_kernels
    from vllm.utils.math_utils import next_power_of_2

    if HAS_TRITON:
        return
    # Launchers compute block sizes with this function, which vLLM's placeholder for Triton lacks.
    if not hasattr(triton, "next_power_of_2"):
        triton.next_power_of_2 = next_power_of_2
    # vLLM imports each module that defines one of the kernels, and rebinds it where it was copied.
    register_kernels(dict(kernels))
