# SPDX-License-Identifier: Apache-2.0
"""Targets and drafts that are mixtures of experts. `test_families.py` compares their rows."""

from functools import partial

import pytest
from model_families import FAMILIES
from vllm import SamplingParams

from helpers import models
from helpers.distributions import LENGTHS, assert_prefixes_follow, next_token
from helpers.engines import engine, greedy_params, token_ids
from helpers.metrics import spec_metrics

BY_NAME = {family.name: family for family in FAMILIES}
PROMPT = [278, 5, 311, 77, 1024, 9]
SAMPLES = 800


@pytest.mark.parametrize("name", ["Mixtral", "Qwen 3 MoE"])
def test_what_is_emitted_follows_a_target_with_experts(name, tmp_path):
    """Plain vLLM's greedy tokens, and the exact distribution, under a schedule that drafts nothing
    for a single request, as it suits such targets."""
    target, draft = models.pair(BY_NAME[name], tmp_path)

    params = SamplingParams(
        n=SAMPLES, max_tokens=LENGTHS[-1], ignore_eos=True, temperature=0.7, top_k=5
    )
    prompts = [{"prompt_token_ids": PROMPT[i:]} for i in range(3)]
    schedule = [[1, 1, None], [2, None, [0, 0, 0, 1, 1, 2]]]
    options = {"model": target, "max_num_seqs": 128, "max_num_batched_tokens": 2048}
    with engine(schedule, draft=draft, verification="traversal", **options) as llm:
        greedy = token_ids(llm.generate(prompts, greedy_params(16), use_tqdm=False))
        alone = token_ids(llm.generate(prompts[:1], greedy_params(16), use_tqdm=False))
        before = spec_metrics(llm)
        output = llm.generate(prompts[0], params, use_tqdm=False)[0]
        metrics = spec_metrics(llm)
    drafts, accepted = (metrics[k] - before[k] for k in ("num_drafts", "num_accepted_tokens"))
    assert accepted > 0.5 * drafts > 0.4 * SAMPLES
    with engine(model=target) as llm:
        assert greedy == token_ids(llm.generate(prompts, greedy_params(16), use_tqdm=False))
    assert alone == greedy[:1]
    assert_prefixes_follow(output, PROMPT, params, partial(next_token, model=target))
