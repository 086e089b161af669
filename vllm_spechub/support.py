# SPDX-License-Identifier: Apache-2.0
"""What works with trees, what is refused, and the test that shows it.

`python -m vllm_spechub.support` renders the tables into the README; tests compare, look every
named test up, and want a row for every field of vLLM's `SamplingParams`.
"""

from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


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


SAMPLING_PARAMETERS = (
    Row(
        ("temperature", "top_k", "top_p"),
        "works",
        "",
        ("engine/test_distribution.py::test_prefixes_follow_the_target",),
    ),
    Row(
        ("seed",),
        "works",
        "a request's tokens are its seed's, whatever else is in the batch, as long as the token "
        "budget cuts none of its trees",
        ("engine/test_faults.py::test_a_seed_holds_beside_other_requests",),
    ),
    Row(
        ("n",),
        "works",
        "",
        ("test_serve.py::test_seeded_samples",),
    ),
    Row(
        ("presence_penalty", "frequency_penalty", "repetition_penalty", "bad_words", "min_tokens"),
        "works",
        "on each node's own history",
        ("engine/test_rows.py::test_processors_see_each_nodes_own_history",),
    ),
    Row(
        ("min_p", "logit_bias"),
        "refused",
        "by vLLM, under any speculation",
        ("engine/test_faults.py::test_parameters_that_vllm_does_not_speculate_with_are_refused",),
    ),
    Row(
        ("stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "max_tokens"),
        "works",
        "",
        (
            "engine/test_faults.py::test_greedy_requests_in_a_mixed_batch",
            "engine/test_greedy.py::test_max_model_len_and_max_tokens",
        ),
    ),
    Row(
        ("logprobs", "prompt_logprobs"),
        "works",
        "",
        ("engine/test_rows.py::test_logprobs_equal_plain_vllm",),
    ),
    Row(
        ("structured_outputs",),
        "works",
        "such a request decodes without its tree",
        ("engine/test_faults.py::test_grammars_share_a_batch_with_trees",),
    ),
    Row(
        (
            "allowed_token_ids",
            "extra_args",
            "thinking_token_budget",
            "logprob_token_ids",
            "prompt_logprob_token_ids",
            "prompt_logprob_start",
            "flat_logprobs",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "output_kind",
            "stream_interval",
            "skip_reading_prefix_cache",
            "repetition_detection",
            "watermarking",
            "routed_experts_prompt_start",
            "trace_decode_token_ids",
        ),
        "not refused, not yet tested",
        "",
        (),
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
        "",
        ("engine/test_greedy.py::test_async_scheduling",),
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
        "any that the platform's attention takes",
        ("engine/test_greedy.py::test_block_sizes",),
    ),
    Row(
        ("streaming",),
        "works",
        "",
        ("test_serve.py::test_streaming_equals_the_whole_answer",),
    ),
    Row(
        ("tensor parallelism",),
        "not refused, not yet tested",
        "",
        (),
    ),
    Row(
        (
            "pipeline, data, context parallelism",
            "DBO",
            "EPLB",
            "batch-sharded sampling",
            "LoRA",
            "fp8 KV cache",
            "KV connectors",
            "prompt embeddings",
            "watermarking",
        ),
        "refused",
        "",
        ("test_config.py::test_unsupported_engines_are_refused",),
    ),
    Row(
        (
            "sliding-window, ALiBi, MLA, M-RoPE, multimodal models",
            "hybrid or Mamba, encoder-decoder models",
        ),
        "refused",
        "",
        ("test_config.py::test_unsupported_engines_are_refused",),
    ),
    Row(
        ("CUDA",),
        "kernels only",
        "checked under Triton's interpreter and compiled for sm_80, sm_90 and sm_100; nothing has "
        "run on a GPU yet, CUDA graphs included",
        (
            "kernels/test_compile.py::test_child_sampling",
            "kernels/test_compile.py::test_verification",
        ),
    ),
)

TABLES = {"sampling parameters": SAMPLING_PARAMETERS, "features": FEATURES}


def render(rows: tuple[Row, ...], code: bool) -> str:
    """A table in Markdown; `code` sets the names in code style."""
    lines = ["| what | state | notes |", "|---|---|---|"]
    for row in rows:
        names = ", ".join(f"`{name}`" if code else name for name in row.names)
        lines.append(f"| {names} | {row.state} | {row.how} |")
    return "\n".join(lines)


def render_into(page: str) -> str:
    """The page with each table between its two comments replaced."""
    for title, rows in TABLES.items():
        first, last = f"<!-- {title}: vllm_spechub/support.py -->\n", f"<!-- end of {title} -->"
        before, found, rest = page.partition(first)
        _, closed, after = rest.partition(last)
        if not (found and closed):
            raise ValueError(f"no place for the table {title!r} between {first!r} and {last!r}")
        table = render(rows, code=rows is SAMPLING_PARAMETERS)
        page = f"{before}{first}{table}\n{last}{after}"
    return page


if __name__ == "__main__":
    README.write_text(render_into(README.read_text()))
