# SPDX-License-Identifier: Apache-2.0
"""What works with trees, what is refused, and the tests that show it.

cog blocks in `docs/support.md` show these tables. A test checks that every named
test exists, and that every field of vLLM's `SamplingParams` has a row.
"""

from dataclasses import dataclass

import vllm_touches
from markdown_table import table
from vllm_decisions import DECISIONS
from vllm_touches import stored


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        names: fields of `SamplingParams`, or names of features.
        state: "works", "refused", or another state in a few words.
        how: notes; may be empty.
        tests: the tests that prove it, as "file::test" with the file relative to `tests/`.
    """

    names: tuple[str, ...]
    state: str
    how: str
    tests: tuple[str, ...]


MIXED = (
    "engine/test_parameters.py::test_every_nodes_row_is_its_paths",
    "engine/test_parameters.py::test_greedy_answers_equal_plain_vllm",
)
LOGPROBS = (
    "engine/test_parameters.py::test_logprobs_equal_plain_vllm",
    "engine/test_random_mixes.py::test_processed_logprobs_equal_plain_vllm",
)

SAMPLING_PARAMETERS = (
    Row(
        ("temperature", "top_k", "top_p", "min_p"),
        "works",
        "also applied to the draft, so truncation costs no acceptance",
        (
            "engine/test_parameters.py::test_every_nodes_row_is_its_paths",
            "engine/test_distribution.py::test_truncation_costs_no_acceptance",
            "engine/test_distribution.py::test_truncated_drafts_follow_the_target",
        ),
    ),
    Row(
        ("seed",),
        "works",
        "with `match`, the text is the one that vLLM's V2 runner gives for the seed without "
        "speculation, up to ties in floating point, whatever the batch, `tree_by_batch_size`, the "
        "token budget and preemption are; with the other rules, the same seed gives the same "
        "tokens regardless of the batch, unless the tree follows the load, or the token budget or "
        "preemption truncates a tree; 64 bits with sign, others are refused",
        (
            "engine/test_match.py::test_static_trees",
            "engine/test_match.py::test_beside_others_under_a_schedule",
            "engine/test_match.py::test_tight_budgets",
            "engine/test_match.py::test_preemption_under_a_schedule",
            "engine/test_parameters.py::test_match_answers_as_plain_decoding",
            "integration/test_request_limits.py::test_refused",
            "engine/test_parameters.py::test_a_seed_fixes_the_answer_in_any_batch",
            "engine/test_faults.py::test_a_seed_holds_beside_other_requests",
        ),
    ),
    Row(
        ("n",),
        "works",
        "",
        ("engine/test_parameters.py::test_several_answers_to_one_prompt",),
    ),
    Row(
        (
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "bad_words",
            "min_tokens",
        ),
        "works",
        "each node sees its own history; bad words and stop tokens are limited by the size of "
        "vLLM's buffers",
        (*MIXED, "engine/test_parameters.py::test_what_cannot_be_served_is_refused"),
    ),
    Row(
        ("logit_bias", "allowed_token_ids"),
        "works",
        "at most 1024 tokens each, the size of vLLM's buffers; requests with more are refused",
        (*MIXED, "engine/test_parameters.py::test_what_cannot_be_served_is_refused"),
    ),
    Row(
        ("extra_args",),
        "works",
        "custom logits processors for the V2 runner see each node's own history; keys that begin "
        "with `target_` mean a [combined target](combined-targets.md)",
        (
            "engine/test_combined_targets.py::test_mixture_with_prefix_hits_and_a_schedule",
            "engine/test_parameters.py::test_every_nodes_row_is_its_paths",
            "engine/test_parameters.py::test_what_was_emitted_could_be",
        ),
    ),
    Row(
        ("thinking_token_budget",),
        "works",
        "with a `reasoning_config`, as in vLLM",
        MIXED,
    ),
    Row(
        (
            "stop",
            "stop_token_ids",
            "include_stop_str_in_output",
            "ignore_eos",
            "max_tokens",
            "repetition_detection",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
        ),
        "works",
        "numbers of any size",
        (*MIXED, "integration/test_request_limits.py::test_answered_as_plain_vllm_does"),
    ),
    Row(
        ("logprobs", "prompt_logprobs", "flat_logprobs", "logprob_token_ids"),
        "works",
        "raw and processed; those of the prompt are refused on the CPU with `enable_lora`, where "
        "they stop plain vLLM",
        (*LOGPROBS, "integration/test_request_limits.py::test_adapters"),
    ),
    Row(
        ("prompt_logprob_token_ids", "prompt_logprob_start"),
        "works",
        "refused on the CPU with `enable_lora`",
        (
            "engine/test_parameters.py::test_scored_prompt_tokens",
            "integration/test_request_limits.py::test_adapters",
        ),
    ),
    Row(
        ("output_kind", "stream_interval"),
        "works",
        "",
        ("integration/test_serve.py::test_streaming_equals_the_whole_answer",),
    ),
    Row(
        ("skip_reading_prefix_cache",),
        "works",
        "",
        LOGPROBS,
    ),
    Row(
        ("structured_outputs",),
        "works",
        "every node has its own mask; the draft model is not masked; with the backends xgrammar, "
        "guidance and outlines (vLLM refuses lm-format-enforcer with any speculation); a reasoning "
        "parser may switch the grammar on within a tree",
        (
            "engine/test_grammar.py::test_every_node_is_masked_as_its_path",
            "engine/test_grammar.py::test_reasoning_that_ends_within_a_tree",
            "engine/test_structured_outputs.py::test_greedy_tokens",
            "engine/test_structured_outputs.py::test_asynchronous_scheduling",
            "engine/test_structured_outputs.py::test_rows",
            "engine/test_structured_outputs.py::test_prefixes_follow_the_masked_target",
            "engine/test_structured_outputs.py::test_reasoning_ends_within_a_tree",
        ),
    ),
    Row(
        ("trace_decode_token_ids",),
        "refused",
        "vLLM refuses it with any speculation",
        ("engine/test_parameters.py::test_what_cannot_be_served_is_refused",),
    ),
    Row(
        ("watermarking", "routed_experts_prompt_start"),
        "without effect",
        "the engine options that they belong to are refused at start-up",
        ("test_config.py::test_unsupported_engines_are_refused",),
    ),
)

FEATURES = (
    Row(
        ("prefix caching",),
        "works",
        "",
        ("engine/test_greedy.py::test_prefix_cache_reuse",),
    ),
    Row(
        ("chunked prefill", "tight token budgets"),
        "works",
        "",
        ("engine/test_greedy.py::test_tight_budgets_truncate_trees",),
    ),
    Row(
        ("preemption",),
        "works",
        "",
        ("engine/test_greedy.py::test_preemption",),
    ),
    Row(
        ("asynchronous scheduling",),
        "works",
        "on by default, on the CPU too",
        (
            "engine/test_greedy.py::test_async_scheduling",
            "test_config.py::test_asynchronous_scheduling_is_as_asked",
        ),
    ),
    Row(
        ("different trees for different loads",),
        "works",
        "`tree_by_batch_size`; refused with data parallelism, where vLLM does not vary the number "
        "of drafted tokens",
        (
            "engine/test_widths.py::test_tokens_while_the_width_changes",
            "integration/test_refusals.py::test_data_parallel_widths",
        ),
    ),
    Row(
        ("trees that each request's step decides (`levels:...`)",),
        "works",
        "with draft models and heads, every built-in rule but `rrs`, and everything in this table; "
        "`ngram` and rules of other packages refuse them",
        (
            "kernels/test_tree_rules.py::test_level_widths_are_lossless",
            "engine/test_level_trees.py::test_requests_of_a_batch_have_trees_of_their_own",
            "engine/test_level_trees.py::test_what_level_widths_refuse",
        ),
    ),
    Row(
        ("aborts",),
        "works",
        "",
        ("engine/test_greedy.py::test_aborted_requests",),
    ),
    Row(
        ("KV block sizes",),
        "works",
        "all sizes that the platform's attention accepts",
        ("engine/test_greedy.py::test_block_sizes",),
    ),
    Row(
        ("streaming",),
        "works",
        "",
        ("integration/test_serve.py::test_streaming_equals_the_whole_answer",),
    ),
    Row(
        ("streaming input",),
        "works",
        "with and without asynchronous scheduling, where vLLM's own chain goes on with the KV of "
        "tokens that a stop has dropped",
        ("engine/test_streaming_sessions.py::test_turns_equal_plain_vllm",),
    ),
    Row(
        ("priority scheduling",),
        "works",
        "",
        ("engine/test_robustness.py::test_priorities",),
    ),
    Row(
        ("sleep and wake",),
        "works",
        "tested on the CPU, which has no sleep mode: the test clears what sleep mode would discard",
        ("engine/test_robustness.py::test_sleep_and_wake",),
    ),
    Row(
        ("tensor parallelism",),
        "works",
        "every rank draws the same tokens, and they equal those of a single rank",
        ("integration/test_parallel.py::test_tensor_parallelism",),
    ),
    Row(
        ("tensor parallelism with Ray workers",),
        "works",
        "the engine refuses to start if a node lacks this package or has another version of it; "
        "tested with workers on the CPU, where plain vLLM refuses Ray",
        (
            "ray_cluster/test_workers.py::test_two_workers_answer_as_one",
            "ray_cluster/test_workers.py::test_a_node_without_this_version",
        ),
    ),
    Row(
        ("data parallelism",),
        "works",
        "for dense models; refused for mixture-of-experts models; on the CPU, vLLM 0.33 itself "
        "wants a memory node for each rank, unless `VLLM_CPU_SIM_MULTI_NUMA=0` is set",
        (
            "integration/test_parallel.py::test_data_parallelism",
            "integration/test_refusals.py::test_data_parallel_experts",
        ),
    ),
    Row(
        ("LoRA",),
        "works",
        "on the target, including its output matrix; the draft runs without an adapter; on the "
        "CPU, requests without an adapter need `max_loras` above the number of adapters, as in "
        "plain vLLM",
        ("engine/test_features.py::test_lora_adapters_on_the_target",),
    ),
    Row(
        ("fp8 KV cache",),
        "works",
        "for target and draft, or for the draft alone; with per-tensor scales; on the CPU only "
        "with AVX-512",
        (
            "engine/test_features.py::test_fp8_cache",
            "kernels/test_triton_backend.py::test_an_fp8_cache_is_read_with_the_layers_scales",
        ),
    ),
    Row(
        ("sliding windows", "several KV cache groups"),
        "works",
        "in all or some layers of target and draft; within a tree, a window counts depths",
        (
            "engine/test_features.py::test_sliding_windows",
            "kernels/test_tree_attention.py::test_window_counts_depths",
        ),
    ),
    Row(
        ("attention sinks",),
        "works",
        "gpt-oss",
        (
            "engine/test_families.py::test_as_target_and_as_draft",
            "kernels/test_tree_attention.py::test_sinks",
            "cpu/tree_kernels/test_tree_sampling.py::test_tree_attention",
        ),
    ),
    Row(
        ("mixtures of experts",),
        "works",
        "a draft with experts needs a target with experts, as in vLLM; with few requests a tree "
        "costs more than it gains, which the default schedule and `tune` know "
        "([what it costs](experts.md))",
        (
            "engine/test_families.py::test_as_target_and_as_draft",
            "engine/test_experts.py::test_what_is_emitted_follows_a_target_with_experts",
            "test_config.py::test_the_default_on_cuda_follows_the_load",
            "measure/test_tuning.py::test_nodes_and_levels_are_priced_apart",
            "trees/test_best_tree.py::test_the_schedule_for_experts_begins_with_nothing",
        ),
    ),
    Row(
        ("W8A8 models",),
        "works",
        "in the format of compressed-tensors",
        ("engine/test_families.py::test_as_target_and_as_draft",),
    ),
    Row(
        ("layers that share a KV cache",),
        "works",
        "Gemma 3n and Gemma 4 as text models",
        (
            "engine/test_families.py::test_as_target_and_as_draft",
            "cpu/tree_kernels/test_compaction.py::test_a_cache_that_layers_share_moves_once",
        ),
    ),
    Row(
        ("plain engines in the same process",),
        "works",
        "they find vLLM as it was",
        ("integration/test_leftovers.py::test_plain_vllm_after_trees",),
    ),
    Row(
        (
            "drafts of another model family",
            "vocabulary sizes that differ by padding",
            "models with untied embeddings",
        ),
        "works",
        "if the draft has the target's tokenizer; tokenizers are not compared if the draft has "
        "none, or with `skip_tokenizer_init`",
        (
            "engine/test_families.py::test_as_target_and_as_draft",
            "engine/test_features.py::test_a_draft_of_another_family_and_padding",
            "proposers/test_draft_model.py::test_no_tokenizer_is_compared_where_there_is_none",
            "engine/test_features.py::test_lora_adapters_on_the_target",
        ),
    ),
    Row(
        ("drafts with another vocabulary", "`use_heterogeneous_vocab`"),
        "refused",
        "by comparing the tokenizers, at the draft's revision; the commands refuse them too; the "
        "target may have added tokens that the draft lacks",
        (
            "test_config.py::test_a_draft_with_another_vocabulary_size",
            "proposers/test_draft_model.py::"
            "test_tokenizers_are_compared_however_they_are_named_and_kept",
            "proposers/test_draft_model.py::test_the_tokenizer_is_of_the_revision_that_is_loaded",
            "measure/test_preflight.py::test_the_pair_has_one_vocabulary",
            "test_config.py::test_refused_options_take_one_line",
        ),
    ),
    Row(
        ("drafts that read fewer positions than the target",),
        "refused",
        "unless vLLM would serve the draft with the target's `max_model_len`",
        (
            "test_config.py::test_a_draft_that_reads_less_than_the_target",
            "test_config.py::test_a_draft_whose_positions_are_scaled",
        ),
    ),
    Row(
        ("drafts from the request's own text (`ngram`)",),
        "works",
        "with every built-in rule and sampling parameter, and all trees but `auto`; the commands, "
        "which measure acceptance, refuse it",
        (
            "proposers/test_ngram.py::test_what_is_found",
            "proposers/test_ngram.py::test_siblings_differ",
            "proposers/test_ngram.py::test_nothing_waits_for_the_device",
            "proposers/test_ngram.py::test_a_target_that_copies_is_accepted_in_full",
            "proposers/test_ngram.py::test_seeds_beside_others_and_with_match",
            "proposers/test_ngram.py::test_greedy_tokens_are_plain_vllms",
            "proposers/test_ngram.py::test_prefixes_follow_the_target",
            "proposers/test_ngram.py::test_options_are_checked",
            "proposers/test_ngram.py::test_schedules_are_checked",
            "proposers/test_ngram.py::test_rules_that_may_draw_are_refused",
            "measure/test_preflight.py::test_a_proposer_is_no_draft",
        ),
    ),
    Row(
        ("combined targets: mixtures, geometric means, proxy tuning, contrastive decoding",),
        "works",
        "`target_distribution`, of a target, a draft model and further `members`, with numbers or "
        '`"off"` per request ([combined targets](combined-targets.md)); heads, `ngram` and '
        "`early_exit` draft for it, and are no members; not run on a GPU",
        (
            "targets/test_combine.py::test_lossless",
            "targets/test_combine.py::test_options_that_are_refused",
            "targets/test_combine.py::test_what_a_request_may_ask_for",
            "targets/test_combine.py::test_what_a_request_may_ask_of_members",
            "test_config.py::test_members",
            "test_config.py::test_members_that_are_refused",
            "engine/test_multimodal.py::test_a_member_reads_the_text_alone",
            "engine/test_combined_targets.py::test_logits_with_truncated_trees_and_preemption",
            "engine/test_combined_targets.py::test_mixture_with_prefix_hits_and_a_schedule",
            "engine/test_combined_targets.py::test_parameters_and_distribution",
            "engine/test_combined_targets.py::test_a_seeds_text_with_and_without_trees",
            "integration/test_parallel.py::test_tensor_parallelism",
            "test_config.py::test_another_package_adds_target_distributions",
        ),
    ),
    Row(
        ("the target's own first layers as the draft (`early_exit`)",),
        "works",
        "for targets whose layers vLLM can cut, with experts, too; with every rule, schedules, "
        "level widths, prefix caching, tensor parallelism, compilation and CUDA graphs; refused "
        "with LoRA, with M-RoPE and in the Transformers backend ([early exits](early-exit.md))",
        (
            "engine/test_early_exit.py::test_nothing_below_the_roots_is_written",
            "engine/test_early_exit.py::test_rows_and_distribution",
            "engine/test_early_exit.py::test_families",
            "engine/test_early_exit.py::test_refusals",
            "engine/test_early_exit.py::test_layerskips_checkpoints",
            "engine/test_early_exit.py::test_a_target_that_is_not_cut",
            "engine/test_cuda_path.py::test_first_layers_through_graphs",
            "engine/test_pass_widths.py::test_the_targets_first_layers_are_compiled_by_themselves",
            "engine/test_level_trees.py::test_requests_of_a_batch_have_trees_of_their_own",
            "engine/test_match.py::test_whatever_the_draft_is",
            "engine/test_multimodal.py::test_the_targets_first_layers_draft",
            "integration/test_parallel.py::test_tensor_parallelism_of_first_layers",
        ),
    ),
    Row(
        ("a draft that is cut at a depth (`draft_layers`)",),
        "works",
        "without weights and KV cache for the layers above; for drafts whose layers vLLM can cut "
        "([nested drafts](nested-drafts.md))",
        (
            "engine/test_nested_drafts.py::test_rows_cache_and_distribution",
            "engine/test_nested_drafts.py::test_auto_is_what_was_measured_for_the_target",
            "engine/test_nested_drafts.py::test_compiled_code_of_another_depth_is_not_taken",
            "engine/test_cuda_path.py::test_first_layers_through_graphs",
            "integration/test_parallel.py::test_tensor_parallelism_of_first_layers",
            "engine/test_nested_drafts.py::test_refusals",
        ),
    ),
    Row(
        ("EAGLE-3 and EAGLE heads", "MTP layers of MiMo and GLM-4.5"),
        "works",
        "EAGLE-3 in both formats, with a reduced vocabulary; told by their configuration and the "
        "names of their weights, their path decides nothing; with sampling parameters, grammars, "
        "LoRA, schedules, prefix caching, tensor parallelism and CUDA graphs, and in the commands "
        "([heads](heads.md))",
        (
            "proposers/test_heads.py::test_eagle3_rows",
            "proposers/test_heads.py::test_rows_of_what_other_eagle3_heads_have",
            "proposers/test_heads.py::test_rows_of_heads_that_read_the_last_layer",
            "proposers/test_heads.py::test_the_kind_is_told_by_the_configuration_and_weights",
            "proposers/test_heads.py::test_a_head_that_is_served_by_its_own_name",
            "proposers/test_draft_model.py::test_a_path_decides_nothing",
            "engine/test_heads.py::test_prefixes_follow_the_target",
            "engine/test_heads.py::test_a_seed_fixes_the_tokens",
            "engine/test_heads.py::test_a_chain_is_accepted_as_vllms_own_is",
            "engine/test_cuda_path.py::test_graphs_replay_what_a_step_needs",
            "engine/test_features.py::test_a_draft_whose_path_names_a_head",
            "engine/test_features.py::test_lora_adapters_on_the_target",
            "engine/test_heads.py::test_a_mixture_of_experts_drafts_with_its_own_layer",
            "engine/test_structured_outputs.py::test_greedy_tokens",
            "integration/test_parallel.py::test_tensor_parallelism_of_a_head",
            "offline/test_heads.py::test_trees_below_roots",
            "offline/test_heads.py::test_commands",
        ),
    ),
    Row(
        (
            "DFlash, DSpark, P-EAGLE, Medusa and MLP speculator heads",
            "several or other MTP layers",
            "heads of another target",
        ),
        "refused",
        "before weights are loaded; a wrong `d2t` when they are",
        (
            "proposers/test_heads.py::test_what_does_not_fit_is_refused",
            "proposers/test_heads.py::test_options_that_do_not_fit_are_refused",
            "proposers/test_heads.py::test_targets_that_do_not_fit_are_refused",
            "proposers/test_heads.py::test_the_map_to_the_targets_tokens",
            "proposers/test_heads.py::test_a_missing_map_is_refused_when_weights_load",
            "offline/test_heads.py::test_heads_that_do_not_fit_are_refused",
            "measure/test_preflight.py::test_heads_that_cannot_draft_trees",
            "proposers/test_draft_model.py::test_a_head_is_refused_by_its_configuration",
            "proposers/test_draft_model.py::test_a_head_that_calls_itself_a_model_is_refused",
        ),
    ),
    Row(
        (
            "a dying worker",
            "a draft folder that disappears",
            "NaN",
            "statistics that fail",
            "oversized requests",
        ),
        "as in plain vLLM",
        "a NaN affects only its own request",
        (
            "integration/test_parallel.py::test_tensor_parallelism",
            "engine/test_robustness.py::test_a_draft_whose_folder_vanishes",
            "engine/test_robustness.py::test_nans_in_the_target",
            "engine/test_robustness.py::test_nans_in_the_draft",
            "engine/test_faults.py::test_a_prompt_too_long_is_refused_and_others_go_on",
        ),
    ),
    Row(
        (
            "pipeline and context parallelism",
            "DBO",
            "EPLB",
            "batch-sharded sampling",
            "KV connectors",
            "prompt embeddings",
            "watermarking",
        ),
        "refused",
        "",
        (
            "integration/test_refusals.py::test_engines",
            "integration/test_refusals.py::test_from_an_engines_arguments",
        ),
    ),
    Row(
        ("[multimodal targets](multimodal.md)", "M-RoPE"),
        "works",
        "with a text draft or `ngram`, [combined](combined-targets.md), too; tried with "
        "images for a tiny LLaVA, Qwen2-VL and Qwen2.5-VL",
        (
            "engine/test_multimodal.py::test_greedy",
            "engine/test_multimodal.py::test_every_node_equals_its_path_decoded_plainly",
            "engine/test_multimodal.py::test_what_is_emitted_follows_a_target_that_has_seen_images",
            "engine/test_multimodal.py::test_a_seed_gives_plain_decodings_text",
            "engine/test_multimodal.py::test_without_images",
            "engine/test_multimodal.py::test_drafts_from_the_text_itself",
            "engine/test_multimodal.py::test_the_commands_read_its_texts",
            "engine/test_multimodal.py::test_a_member_reads_the_text_alone",
            "engine/test_cuda_path.py::test_graphs_of_a_target_with_images_and_mrope",
        ),
    ),
    Row(
        (
            "image tokens that see each other in both directions",
            "multimodal drafts",
            "heads on multimodal targets, early exits with M-RoPE",
            "pruned videos",
            "audio while decoding",
        ),
        "refused",
        "[more](multimodal.md#what-is-tested-and-what-is-refused)",
        (
            "integration/test_refusals.py::test_multimodal_models",
            "integration/test_refusals.py::test_multimodal_drafts",
            "integration/test_refusals.py::test_heads_on_multimodal_targets",
            "engine/test_multimodal.py::test_the_targets_first_layers_draft",
        ),
    ),
    Row(
        (
            "hybrid or Mamba, MLA, ALiBi models",
            "chunked attention",
            "encoder-decoder models",
        ),
        "refused",
        "MLA models run with `VLLM_MLA_DISABLE=1`",
        (
            "integration/test_refusals.py::test_models",
            "integration/test_refusals.py::test_kinds_of_models",
        ),
    ),
    Row(
        ("CUDA",),
        "not run yet",
        "the kernels run in Triton's interpreter and compile for sm_80, sm_90 and sm_100; the "
        "attention backend and the use of CUDA graphs are tested in an engine on the CPU, where "
        "replaying a graph repeats the captured call",
        (
            "engine/test_cuda_path.py::test_graphs_replay_what_a_step_needs",
            "kernels/test_compile.py::test_drawing_children",
            "kernels/test_compile.py::test_statistics",
            "kernels/test_compile.py::test_deciding",
        ),
    ),
)

RUNS = {
    "0.32.0": ("the whole test suite, in CI", "not run"),
    "0.33.0": ("the whole test suite, over compiled parts of 0.32.0", "not run"),
}
"""By supported version of vLLM: what was run on the CPU, and on CUDA."""

TABLES = {"sampling parameters": SAMPLING_PARAMETERS, "features": FEATURES}


def sampling_parameters() -> str:
    """The table of all fields of `SamplingParams`."""
    return _rows(SAMPLING_PARAMETERS, "`{}`")


def features() -> str:
    """The table of features of engines and models."""
    return _rows(FEATURES, "{}")


def versions() -> str:
    """The table of what was read and what was run of each version."""
    rows = [
        [version, f"{sum(map(len, known.values()))} places", *RUNS[version]]
        for version, known in stored().items()
    ]
    return table(["vLLM", "sources read", "run on the CPU", "run on CUDA"], rows)


def differences(version: str) -> str:
    """The table of what differs in a version from the one before, a line for each place."""
    known, decisions = stored(), DECISIONS[version]
    before = [*known][[*known].index(version) - 1]
    found: dict[str, list[str]] = {symbol: [] for symbol in decisions}
    for kind, symbols in vllm_touches.differences(known[before], known[version]).items():
        for symbol in symbols:
            found[symbol].append(kind)
    return table(
        ["place", "kinds", "what it means here"],
        [[f"`{symbol}`", ", ".join(kinds), decisions[symbol]] for symbol, kinds in found.items()],
    )


def _rows(rows: tuple[Row, ...], name: str) -> str:
    return table(
        ["what", "state", "notes"],
        [[", ".join(name.format(one) for one in row.names), row.state, row.how] for row in rows],
    )
