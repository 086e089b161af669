# SPDX-License-Identifier: Apache-2.0
"""What heads draft: every row against plain PyTorch, and which heads are taken and refused."""

import pytest
import torch
from vllm import SamplingParams

from helpers import heads
from helpers.engines import engine, greedy_params, plain_greedy, token_ids
from helpers.heads import EAGLE3, Oracle, recorded_rows
from helpers.metrics import spec_metrics
from helpers.pair import PROMPTS, TARGET

SAMPLED = SamplingParams(temperature=1.0, seed=3, max_tokens=24, ignore_eos=True)
SHARED = "# Copyright (C) 2001 Python Software Foundation\n# Author: " + "a, b, c = 1, 2, 3\n" * 9
IRREGULAR = [0, 0, 0, 1, 1, 2, 4]
SCHEDULE = [[1, 2, "binary:2"], [3, 4, "chain:2"], [5, None, None]]


def assert_rows_are_the_oracles(oracle, rows, every):
    checked = rows[::every]
    assert len(checked) > 30
    for row in checked:
        expected = oracle.row(row.text, row.path)
        torch.testing.assert_close(row.logits, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("form", "tree", "options"),
    [
        ("speculators", "binary:3", {"max_num_batched_tokens": 41, "block_size": 32}),
        ("first", IRREGULAR, {"async_scheduling": True, "kv_cache_memory_bytes": 1 << 19}),
        ("speculators", SCHEDULE, {"max_num_batched_tokens": 60}),
    ],
)
def test_eagle3_rows(tmp_path, form, tree, options):
    """Chunks, prompts that share blocks, rejections, mixed batches, preemption, steps without a
    tree."""
    head = EAGLE3
    if form == "first":
        head = heads.eagle3_as_first_published(tmp_path / "head")
    prompts = [*PROMPTS, SHARED + "b = 2", SHARED + "c = 3"]
    params = [SAMPLED.clone() for _ in prompts]
    for i, each in enumerate(params):
        each.max_tokens = 16 + 4 * i
    with recorded_rows() as rows, engine(tree, draft=head, **options) as llm:
        llm.generate(prompts[-1:], SAMPLED, use_tqdm=False)
        llm.generate(prompts, params, use_tqdm=False)
        answers = token_ids(llm.generate(PROMPTS, greedy_params(), use_tqdm=False))
        metrics = spec_metrics(llm)
    assert answers == plain_greedy()
    assert metrics["num_accepted_tokens"] > 0.2 * metrics["num_drafts"]
    assert_rows_are_the_oracles(Oracle("eagle3", head), rows, 37)


@pytest.mark.parametrize("kind", ["eagle", "mtp"])
def test_rows_of_heads_that_read_the_last_layer(tmp_path, kind):
    """EAGLE's first heads and a target's own MTP layer."""
    made = (heads.eagle1 if kind == "eagle" else heads.mimo)(tmp_path / "made")
    models = {"draft": made}
    if kind == "mtp":  # for whose type transformers would split texts in another way
        models = {"model": made, "draft": None, "tokenizer": TARGET}
    options = {"max_num_batched_tokens": 41, "block_size": 32}
    prompts = [SHARED + "b = 2", *PROMPTS, SHARED + "c = 3"]
    with recorded_rows() as rows, engine(IRREGULAR, **models, **options) as llm:
        llm.generate(prompts, SAMPLED, use_tqdm=False)
        llm.generate(prompts[-1:], SAMPLED, use_tqdm=False)
        answers = token_ids(llm.generate(PROMPTS, greedy_params(), use_tqdm=False))
        metrics = spec_metrics(llm)
    assert answers == plain_greedy()
    assert metrics["num_accepted_tokens"] > 0.1 * metrics["num_drafts"]
    assert_rows_are_the_oracles(Oracle(kind, made), rows, 37)
