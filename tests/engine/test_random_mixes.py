# SPDX-License-Identifier: Apache-2.0
"""Random mixes of sampling parameters and prompts, on engines of several shapes and sizes.

Whatever is asked together, every node's row is its own path's, every answer could be a plain
decode's, and no KV block is lost.
"""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams

from helpers.engines import engine, logprob_rows, model_runner
from helpers.oracle import (
    REASONING,
    Repel,
    assert_plausible,
    assert_same_row,
    processed_row,
    reference_model,
    resolved,
    tokens_of,
)
from helpers.pair import PROMPTS
from helpers.recording import recorded_nodes, request_of

ENGINES = {
    # trees are cut by the budget, and requests preempted
    "tight": {
        "tree": "kary:3:2",
        "verification": "unordered",
        "max_num_batched_tokens": 48,
        "block_size": 32,
        "num_gpu_blocks_override": 9,
        "logprobs_mode": "processed_logprobs",
    },
    "roomy": {"tree": [0, 0, 0, 1, 1, 2, 4, 4, 4, 4, 6, 11], "block_size": 64},
}
TEXT = [token for prompt in PROMPTS for token in tokens_of(prompt)]

prompts = st.builds(
    lambda start, length: TEXT[start : start + length],
    st.integers(0, len(TEXT) - 80),
    st.integers(1, 80),
)
parameters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.0, 0.4, 0.9, 1.5]),
        "max_tokens": st.integers(5, 24),
        "seed": st.integers(0, 2**31),
    },
    optional={
        "top_k": st.sampled_from([1, 2, 9]),
        "top_p": st.sampled_from([0.2, 0.7, 0.95]),
        "min_p": st.sampled_from([0.02, 0.3]),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.6, 2),
        "logit_bias": st.dictionaries(st.integers(0, 400), st.floats(-100, 8), min_size=1),
        "allowed_token_ids": st.sampled_from([[5, 199, 278, 289], list(range(100, 600))]),
        "bad_words": st.sampled_from([["self"], [" =", "return None", "in range"]]),
        "min_tokens": st.integers(1, 5),
        "stop": st.sampled_from(["self", ["\n", " = "]]),
        "stop_token_ids": st.sampled_from([[199], [278, 12, 300]]),
        "ignore_eos": st.just(True),
        "logprobs": st.integers(0, 4),
        "prompt_logprobs": st.integers(0, 2),
        "thinking_token_budget": st.integers(0, 8),
        "extra_args": st.sampled_from([{"repel": 1.0}, {"repel": 5.0}]),
    },
)
batches = st.lists(
    st.tuples(prompts, st.builds(lambda options: SamplingParams(**options), parameters)),
    min_size=1,
    max_size=7,
)


GREEDY = [
    SamplingParams(temperature=0, max_tokens=16, logprobs=3, **options)
    for options in (
        {},
        {"presence_penalty": 0.7, "repetition_penalty": 1.3},
        {"logit_bias": {278: -5.0, 199: 3.0}, "min_tokens": 6, "stop_token_ids": [199]},
        {"allowed_token_ids": list(range(200, 800)), "frequency_penalty": 1.0},
        {"bad_words": [" =", "self", "in range"]},
    )
]


def greedy_entries(llm) -> list[dict[int, float]]:
    outputs = llm.generate(PROMPTS[: len(GREEDY)], GREEDY, use_tqdm=False)
    return [row for output in outputs for row in logprob_rows(output)]


@cache
def plain_entries() -> list[dict[int, float]]:
    """Plain vLLM's processed logprobs of GREEDY."""
    with engine(logprobs_mode="processed_logprobs") as llm:
        return greedy_entries(llm)


@pytest.fixture(scope="module", params=ENGINES)
def llm(request):
    plain_entries()  # one engine at a time
    options = ENGINES[request.param]
    with engine(**options, logits_processors=[Repel], reasoning_config=REASONING) as llm:
        yield llm


def assert_rows_follow_their_paths(nodes, cases) -> None:
    for i, node in enumerate(nodes[::3]):
        prompt, output, params = cases[request_of(node.req_id)]
        history = [*(prompt + output)[: node.root_position + 1], *node.path_tokens]
        expected = processed_row(node.logits, prompt, history[len(prompt) :], params)
        assert_same_row(node.processed / (node.temperature or 1.0), expected)
        if i % 25 == 0:
            plain = reference_model()(input_ids=torch.tensor([history])).logits[0, -1]
            torch.testing.assert_close(node.logits, plain, atol=5e-4, rtol=1e-3)


def assert_logprobs_are_their_rows(answer, prompt, output, params, processed: bool) -> None:
    logits = reference_model()(input_ids=torch.tensor([prompt + output])).logits[0]
    for i, entries in enumerate(answer.logprobs or []):
        row = logits[len(prompt) + i - 1]
        if processed:
            row = processed_row(row, prompt, output[:i], params)
        wanted = row.log_softmax(0)
        top = max(params.logprobs, 1)
        assert len(entries) >= top
        assert output[i] in entries
        for token, entry in entries.items():
            # an edge of a truncation, or an entry past its end
            if wanted[token] > -30 and entry.logprob > -30:
                np.testing.assert_allclose(entry.logprob, wanted[token], atol=2e-3)


def test_random_mixes(llm):
    @settings(
        max_examples=25,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(batches)
    def mixes(batch):
        check_batch(llm, batch)

    mixes()
    # Trees were cut and requests preempted, or this shows less than it says.
    preemptions = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    tight = llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens == 48
    assert (preemptions[0] > 0) == tight


def check_batch(llm, batch) -> None:
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    processed = model_runner(llm).sampler.logprobs_mode == "processed_logprobs"
    with recorded_nodes() as nodes:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in batch],
            [params.clone() for _, params in batch],
            use_tqdm=False,
        )
    cases = {}
    for output, (prompt, params) in zip(outputs, batch, strict=True):
        answer, params = output.outputs[0], resolved(params)
        tokens = list(answer.token_ids)
        cases[output.request_id] = (prompt, tokens, params)
        assert params.min_tokens <= len(tokens) <= params.max_tokens
        assert (answer.finish_reason == "stop") or len(tokens) == params.max_tokens
        assert_plausible(prompt, tokens, params)
        assert_logprobs_are_their_rows(answer, prompt, tokens, params, processed)
        assert len(output.prompt_logprobs or []) in (0, len(prompt))
    assert_rows_follow_their_paths(nodes, cases)
    llm.llm_engine.step()  # frees what the last step finished
    assert pool.get_num_free_blocks() == free


@pytest.mark.parametrize("llm", ["tight"], indirect=True)
def test_processed_logprobs_equal_plain_vllm(llm):
    found = greedy_entries(llm)
    assert len(found) == len(plain_entries())
    for row, wanted in zip(found, plain_entries(), strict=True):
        assert row.keys() == wanted.keys()
        np.testing.assert_allclose(list(row.values()), [wanted[t] for t in row], atol=1e-4)
