# SPDX-License-Identifier: Apache-2.0
"""What works with trees, what is refused, and the test that shows it.

cog blocks in the README and in `docs/support.md` show these tables. Tests look up every named test,
and want a row for every field of vLLM's `SamplingParams`.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

from markdown_table import table
from vllm_touches import stored

from vllm_spechub.integration.patch import SUPPORTED_VLLM

CHECKS = Path(__file__).parents[1] / "docs" / "support.csv"
"""What `scripts/check_vllm.py VERSION --record` found."""


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        names: fields of `SamplingParams`, or names of features.
        state: "works", "refused", or what else is true, in a few words.
        how: what there is to know about it, or nothing.
        tests: "file::test" of each proof, below `tests/`.
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
        "on the draft too, so that truncation costs no acceptance",
        (
            "engine/test_parameters.py::test_every_nodes_row_is_its_paths",
            "engine/test_distribution.py::test_truncation_costs_no_acceptance",
            "engine/test_distribution.py::test_truncated_drafts_follow_the_target",
        ),
    ),
    Row(
        ("seed",),
        "works",
        "the same seed gives the same tokens regardless of the batch, unless the token budget or "
        "preemption truncates a tree",
        (
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
        "on each node's own history; at most as many bad words and stop tokens as vLLM's buffers "
        "hold",
        (*MIXED, "engine/test_parameters.py::test_what_cannot_be_served_is_refused"),
    ),
    Row(
        ("logit_bias", "allowed_token_ids"),
        "works",
        "at most 1024 tokens each, the size of vLLM's buffers; more are refused",
        (*MIXED, "engine/test_parameters.py::test_what_cannot_be_served_is_refused"),
    ),
    Row(
        ("extra_args",),
        "works",
        "custom logits processors of the V2 runner's interface see each node's own history",
        (
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
        "",
        MIXED,
    ),
    Row(
        ("logprobs", "prompt_logprobs", "flat_logprobs", "logprob_token_ids"),
        "works",
        "raw and processed",
        LOGPROBS,
    ),
    Row(
        ("prompt_logprob_token_ids", "prompt_logprob_start"),
        "works",
        "",
        ("engine/test_parameters.py::test_scored_prompt_tokens",),
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
        "one mask per node; the draft model itself is not masked; with the backends xgrammar, "
        "guidance and outlines (vLLM refuses lm-format-enforcer under any speculation); a "
        "reasoning parser may switch the grammar on within a tree",
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
        "by vLLM, under any speculation",
        ("engine/test_parameters.py::test_what_cannot_be_served_is_refused",),
    ),
    Row(
        ("watermarking", "routed_experts_prompt_start"),
        "without effect",
        "as in vLLM without the engine options they belong to, which are refused at start-up",
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
        ("trees that follow the load",),
        "works",
        "with `tree_by_batch_size`; refused with data parallelism, where vLLM does not vary the "
        "number of drafted tokens",
        (
            "engine/test_widths.py::test_tokens_while_the_width_changes",
            "integration/test_refusals.py::test_data_parallel_widths",
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
        "every size that the platform's attention accepts",
        ("engine/test_greedy.py::test_block_sizes",),
    ),
    Row(
        ("streaming",),
        "works",
        "",
        ("integration/test_serve.py::test_streaming_equals_the_whole_answer",),
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
        "tested on the CPU, which has no sleep mode, by clearing what sleep mode would not keep",
        ("engine/test_robustness.py::test_sleep_and_wake",),
    ),
    Row(
        ("tensor parallelism",),
        "works",
        "all ranks draw the same tokens, and the same as a single rank",
        ("integration/test_parallel.py::test_tensor_parallelism",),
    ),
    Row(
        ("tensor parallelism over Ray's workers",),
        "works",
        "refuses to start if a node lacks this package or has another version; tested with workers "
        "on the CPU, where vLLM by itself refuses Ray",
        (
            "ray_cluster/test_workers.py::test_two_workers_answer_as_one",
            "ray_cluster/test_workers.py::test_a_node_without_this_version",
        ),
    ),
    Row(
        ("data parallelism",),
        "works",
        "for dense models; refused for mixtures of experts",
        (
            "integration/test_parallel.py::test_data_parallelism",
            "integration/test_refusals.py::test_data_parallel_experts",
        ),
    ),
    Row(
        ("LoRA",),
        "works",
        "on the target, its output matrix included; the draft has no adapter",
        ("engine/test_features.py::test_lora_adapters_on_the_target",),
    ),
    Row(
        ("fp8 KV cache",),
        "works",
        "for target and draft or the draft alone; per-tensor scales, on the CPU with AVX-512",
        (
            "engine/test_features.py::test_fp8_cache",
            "kernels/test_triton_backend.py::test_an_fp8_cache_is_read_with_the_layers_scales",
        ),
    ),
    Row(
        ("sliding windows", "several KV cache groups"),
        "works",
        "in all or some layers of target and draft; within a tree, distances are counted in depths",
        (
            "engine/test_features.py::test_sliding_windows",
            "kernels/test_tree_attention.py::test_window_counts_depths",
        ),
    ),
    Row(
        ("drafts of another family", "vocabulary sizes that differ by padding", "untied models"),
        "works",
        "with the target's tokenizer; without a tokenizer beside the draft's weights, or with "
        "`skip_tokenizer_init`, no tokenizers are compared",
        (
            "engine/test_features.py::test_a_draft_of_another_family_and_padding",
            "proposers/test_draft_model.py::test_no_tokenizer_is_compared_where_there_is_none",
            "engine/test_features.py::test_lora_adapters_on_the_target",
        ),
    ),
    Row(
        ("drafts of another vocabulary", "`use_heterogeneous_vocab`"),
        "refused",
        "by the tokenizers that are loaded, at the draft's revision, however the draft is named; "
        "by the commands, too",
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
        ("EAGLE, Medusa and MTP heads", "DFlash and DSpark drafts"),
        "refused",
        "by their configuration and the names of their weights; words in a path decide nothing",
        (
            "proposers/test_draft_model.py::test_a_head_is_refused_by_its_configuration",
            "proposers/test_draft_model.py::test_a_head_that_calls_itself_a_model_is_refused",
            "proposers/test_draft_model.py::test_a_path_decides_nothing",
            "engine/test_features.py::test_a_draft_whose_path_names_a_head",
        ),
    ),
    Row(
        ("a worker, a draft folder or numbers that fail", "oversized requests"),
        "as in plain vLLM",
        "a NaN ruins its own request alone",
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
        (
            "hybrid or Mamba, M-RoPE, MLA, ALiBi models",
            "chunked attention",
            "multimodal, encoder-decoder models",
        ),
        "refused",
        "",
        (
            "integration/test_refusals.py::test_models",
            "integration/test_refusals.py::test_kinds_of_models",
        ),
    ),
    Row(
        ("CUDA",),
        "not run yet",
        "kernels are checked under Triton's interpreter and compiled for sm_80, sm_90 and sm_100; "
        "the attention backend and the use of CUDA graphs are tested in an engine on the CPU, "
        "where replaying a graph repeats the captured call",
        (
            "engine/test_cuda_path.py::test_graphs_replay_what_a_step_needs",
            "kernels/test_compile.py::test_child_sampling",
            "kernels/test_compile.py::test_verification",
        ),
    ),
)

VERSIONS = {
    "0.32.0": ("supported", "the whole test suite", "not run"),
    "0.33.0": ("refused at start-up", "not run", "not run"),
}
"""By vLLM version: its state, and what was run on the CPU and on CUDA."""

TABLES = {"sampling parameters": SAMPLING_PARAMETERS, "features": FEATURES}


def sampling_parameters() -> str:
    """Every field of `SamplingParams`."""
    return _rows(SAMPLING_PARAMETERS, "`{}`")


def features() -> str:
    """Features of engines and models."""
    return _rows(FEATURES, "{}")


def states() -> str:
    """vLLM's versions and their state."""
    return table(["vLLM", "state"], [[version, state] for version, (state, *_) in VERSIONS.items()])


def versions() -> str:
    """What was read and what was run of each version."""
    rows = []
    for version, (state, *run) in VERSIONS.items():
        checks = [check for check in _checks() if check["vllm"] == version]
        if version == SUPPORTED_VLLM:
            read = f"{sum(map(len, stored().values()))} places, with which others are compared"
        else:
            differing = [
                f"{check['differ']} of {check['read']} {check['kind']}"
                for check in checks
                if check["differ"] != "0"
            ]
            read = f"on {checks[0]['date']}, differ: {', '.join(differing) or 'none'}"
        rows.append([version, state, read, *run])
    return table(["vLLM", "state", "read, not run", "run on the CPU", "run on CUDA"], rows)


def differences(version: str) -> str:
    """What differs in a version from the supported one: a line for each place."""
    lines = [
        [check["kind"], f"`{symbol}`", problem]
        for check in _checks()
        if check["vllm"] == version
        for symbol, _, problem in (line.partition(" ") for line in check["differences"].split("\n"))
        if symbol
    ]
    return table(["kind", "what", "difference"], lines)


def _checks() -> list[dict[str, str]]:
    with CHECKS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _rows(rows: tuple[Row, ...], name: str) -> str:
    return table(
        ["what", "state", "notes"],
        [[", ".join(name.format(one) for one in row.names), row.state, row.how] for row in rows],
    )
