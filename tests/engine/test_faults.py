# SPDX-License-Identifier: Apache-2.0
"""What cannot be served is refused as vLLM refuses it, and its neighbours are not disturbed."""

from functools import cache

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from helpers.engines import engine, greedy_params, plain_greedy, token_ids
from helpers.pair import PROMPTS

TREE = "binary:3"
TOO_LONG = {"prompt_token_ids": [5] * 300}
FULL = {
    "max_model_len": 128,
    "block_size": 32,
    "num_gpu_blocks_override": 5,
}  # one request of max_model_len, no more
TO_THE_END = [greedy_params(128, ignore_eos=True)] * 5


MIXED = [
    greedy_params(),
    greedy_params(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3),
    greedy_params(stop=["self", "\n"], min_tokens=12),
    greedy_params(stop_token_ids=[292, 40], bad_words=[" =", "self"]),
    greedy_params(logprobs=3, frequency_penalty=0.9),
    greedy_params(stop="99", include_stop_str_in_output=True),
]
SAMPLED = [
    SamplingParams(temperature=1.0, max_tokens=40, seed=1),
    SamplingParams(temperature=0.8, top_p=0.9, max_tokens=30, presence_penalty=0.5),
    SamplingParams(temperature=0.7, top_k=20, max_tokens=50, stop=["def"], min_tokens=20),
]


def ask(llm, params, prompts=PROMPTS):
    return llm.generate(prompts[: len(params)], params, use_tqdm=False)


def finish(core):
    """Step until every request is done. -> the token ids by request id"""
    answers = {}
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                answers[output.request_id] = list(output.outputs[0].token_ids)
    return answers


@cache
def plain():
    """What plain vLLM answers to everything asked here."""
    with engine() as llm:
        mixed = [output.outputs[0] for output in ask(llm, MIXED)]
        with pytest.raises(VLLMValidationError) as too_long:
            llm.generate(TOO_LONG, greedy_params(), use_tqdm=False)
    with engine(**FULL) as llm:
        full = token_ids(ask(llm, TO_THE_END))
    with pytest.raises(ValueError) as no_room, engine(**FULL | {"num_gpu_blocks_override": 4}):
        pass
    return {
        "mixed": [(list(answer.token_ids), answer.text, answer.stop_reason) for answer in mixed],
        "too_long": str(too_long.value),
        "full": full,
        "no_room": str(no_room.value),
    }


@pytest.fixture(scope="module")
def llm():
    plain(), plain_greedy()  # one engine at a time
    with engine(TREE) as llm:
        yield llm


def test_trees_after_plain_vllm_in_one_process():
    """vLLM remembers which attention backend it chose; plain vLLM's sees no trees."""
    with engine() as llm:
        expected = token_ids(ask(llm, [greedy_params()] * len(PROMPTS)))
    with engine(TREE) as llm:
        answers = token_ids(ask(llm, [greedy_params()] * len(PROMPTS)))
    assert answers == expected


def test_a_prompt_too_long_is_refused_and_others_go_on(llm):
    core = llm.llm_engine
    for i in (0, 4):
        core.add_request(str(i), PROMPTS[i], greedy_params())
    core.step()
    core.step()
    with pytest.raises(VLLMValidationError) as error:
        core.add_request("long", TOO_LONG, greedy_params())
    assert str(error.value) == plain()["too_long"]
    assert finish(core) == {str(i): plain_greedy()[i] for i in (0, 4)}


def test_greedy_requests_in_a_mixed_batch(llm):
    """Each answers as it would without trees, whatever its neighbours ask for."""
    prompts = [*PROMPTS, *PROMPTS[: len(SAMPLED)]]
    outputs = [output.outputs[0] for output in ask(llm, MIXED + SAMPLED, prompts)]
    answers = [(list(o.token_ids), o.text, o.stop_reason) for o in outputs[: len(MIXED)]]
    assert answers == plain()["mixed"]
    assert sum(reason is not None for *_, reason in answers) >= 2
    for output, params in zip(outputs[len(MIXED) :], SAMPLED, strict=True):
        assert params.min_tokens <= len(output.token_ids) <= params.max_tokens
        assert output.finish_reason in ("stop", "length")


@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[1]], ids=["long", "one token"])
@pytest.mark.parametrize("head_start", [0, 1, 2, 5])
def test_a_seed_holds_beside_other_requests(llm, head_start, prompt):
    """A prompt's step may share its batch with trees, which are sampled by another sampler."""
    core = llm.llm_engine
    seeds = [SamplingParams(temperature=1.0, seed=seed, max_tokens=12) for seed in range(4)]
    alone = [list(o.outputs[0].token_ids) for o in ask(llm, seeds, [prompt] * len(seeds))]
    core.add_request("other", PROMPTS[2], greedy_params(60, ignore_eos=True))
    for _ in range(head_start):
        core.step()
    for i, params in enumerate(seeds):
        core.add_request(str(i), prompt, params)
    answers = finish(core)
    assert [answers[str(i)] for i in range(len(seeds))] == alone


def test_a_cache_that_cannot_hold_one_request_is_refused():
    with (
        pytest.raises(ValueError, match="larger than the available KV cache") as error,
        engine(TREE, **FULL | {"num_gpu_blocks_override": 4}),
    ):
        pass
    # the same line, with the draft's layers counted in
    first, _, _ = str(error.value).partition("(")
    assert plain()["no_room"].startswith(first)


def test_a_cache_that_holds_exactly_one_request():
    """Five requests grow to max_model_len and take turns."""
    with engine(TREE, **FULL) as llm:
        answers = token_ids(ask(llm, TO_THE_END))
        preemptions = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    assert answers == plain()["full"]
    assert preemptions[0] > 0
