# SPDX-License-Identifier: Apache-2.0
"""What heads draft: every row against plain PyTorch, and which heads are taken and refused."""

import pytest
import torch
from vllm import SamplingParams

from helpers import heads
from helpers.engines import engine, greedy_params, plain_greedy, token_ids
from helpers.heads import Oracle, recorded_rows
from helpers.metrics import spec_metrics
from helpers.oracle import tokens_of
from helpers.pair import PROMPTS, TARGET

SAMPLED = SamplingParams(temperature=1.0, seed=3, max_tokens=24, ignore_eos=True)
# Two prompts that are alike up to the end of a block: the block's last row of a head differs, as it
# reads the token after it.
ALIKE = [{"prompt_token_ids": [*tokens_of(PROMPTS[5])[:64], token, 3]} for token in (5, 6)]
IRREGULAR = [0, 0, 0, 1, 1, 2, 4]
SCHEDULE = [[1, 2, "binary:2"], [3, 4, "chain:2"], [5, None, None]]


def assert_rows_are_the_oracles(oracle, rows):
    depths = {len(row.path) for row in rows}
    assert len(depths) > 1
    checked = [rows[i] for i in torch.linspace(0, len(rows) - 1, 40).int()]
    for row in checked:
        expected = oracle.row(row.text, row.path)
        torch.testing.assert_close(row.logits, expected, atol=2e-4, rtol=1e-4)


def engine_counters(llm):
    return {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}


@pytest.mark.parametrize(
    ("form", "tree", "options"),
    [
        ("speculators", "binary:3", {"max_num_batched_tokens": 41}),
        ("first", IRREGULAR, {"async_scheduling": True, "kv_cache_memory_bytes": 1 << 20}),
        ("speculators", SCHEDULE, {"max_num_batched_tokens": 60}),
    ],
    ids=["chunks", "preemption", "schedule"],
)
def test_eagle3_rows(tmp_path, form, tree, options):
    """Prompts in chunks and with shared blocks, rejections, mixed batches, preemption, steps
    without a tree."""
    head = heads.eagle3(tmp_path / "head", form)
    prompts = [*PROMPTS, *ALIKE]
    params = [SAMPLED.clone() for _ in prompts]
    for i, each in enumerate(params):
        each.max_tokens = 16 + 4 * i
    with recorded_rows() as rows, engine(tree, draft=head, block_size=32, **options) as llm:
        llm.generate(ALIKE[:1], SAMPLED, use_tqdm=False)
        llm.generate(prompts, params, use_tqdm=False)
        answers = token_ids(llm.generate(PROMPTS, greedy_params(), use_tqdm=False))
        metrics, counters = spec_metrics(llm), engine_counters(llm)
    assert answers == plain_greedy()
    assert metrics["num_accepted_tokens"] > 0.2 * metrics["num_drafts"]
    assert counters["vllm:prefix_cache_hits"] > 0
    if "kv_cache_memory_bytes" in options:
        assert counters["vllm:num_preemptions"] > 0
    assert_rows_are_the_oracles(Oracle("eagle3", head), rows)


@pytest.mark.parametrize("kind", ["eagle", "mtp"])
def test_rows_of_heads_that_read_the_last_layer(tmp_path, kind):
    """EAGLE's first heads and a target's own MTP layer."""
    made = (heads.eagle1 if kind == "eagle" else heads.mimo)(tmp_path / "made")
    models = {"draft": made}
    if kind == "mtp":  # for whose type transformers would split texts in another way
        models = {"model": made, "draft": None, "tokenizer": TARGET}
    options = {"max_num_batched_tokens": 41, "block_size": 32}
    prompts = [*ALIKE[:1], *PROMPTS]
    with recorded_rows() as rows, engine(IRREGULAR, **models, **options) as llm:
        llm.generate(prompts, SAMPLED, use_tqdm=False)
        llm.generate(ALIKE[1:], SAMPLED, use_tqdm=False)
        answers = token_ids(llm.generate(PROMPTS, greedy_params(), use_tqdm=False))
        metrics = spec_metrics(llm)
    assert answers == plain_greedy()
    assert metrics["num_accepted_tokens"] > 0.1 * metrics["num_drafts"]
    assert_rows_are_the_oracles(Oracle(kind, made), rows)
