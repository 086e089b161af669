# SPDX-License-Identifier: Apache-2.0
"""No number and no list of a request stops an engine: answered as plain vLLM does, or refused."""

import sys

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

from helpers import models
from helpers.engines import engine, token_ids
from helpers.oracle import REASONING, tokens_of
from helpers.pair import PROMPTS, TARGET

OPTIONS = {"max_model_len": 64, "max_logprobs": -1, "reasoning_config": REASONING}
HUGE = (2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, sys.maxsize, 2**64, 2**70)
COUNT = 6


def greedy(**options):
    return SamplingParams(**{"temperature": 0, "max_tokens": COUNT, "ignore_eos": True} | options)


def sampled(**options):
    return SamplingParams(**{"temperature": 1, "max_tokens": COUNT, "ignore_eos": True} | options)


def repetition(**sizes):
    sizes = {"max_pattern_size": 4, "min_pattern_size": 1, "min_count": 3} | sizes
    return {"repetition_detection": RepetitionDetectionParams(**sizes)}


ANSWERED = {
    # as plain vLLM answers
    **{f"max_tokens={n}": greedy(max_tokens=n) for n in HUGE},
    **{f"min_tokens={n}": greedy(max_tokens=n, min_tokens=n) for n in HUGE},
    "max_tokens=None": greedy(max_tokens=None),
    "min_tokens to the end": greedy(max_tokens=2**31, min_tokens=2**31, stop_token_ids=[199]),
    **{f"top_k={n}": greedy(top_k=n) for n in HUGE},
    **{f"thinking_token_budget={n}": greedy(thinking_token_budget=n) for n in HUGE},
    **{f"stream_interval={n}": greedy(stream_interval=n) for n in HUGE},
    **{f"max_pattern_size={n}": greedy(**repetition(max_pattern_size=n)) for n in HUGE},
    **{f"min_count={n}": greedy(**repetition(min_count=n)) for n in HUGE},
    "pattern of 2**70": greedy(**repetition(max_pattern_size=2**70, min_pattern_size=2**70)),
    "logit_bias=1e39": greedy(logit_bias={5: 1e39}),
    "logit_bias=-1e39": greedy(logit_bias={5: -1e39}),
    "logit_bias=2**70": greedy(logit_bias={5: 2**70}),
    "logit_bias=inf": greedy(logit_bias={5: -np.inf}),
    "repetition_penalty=1e39": greedy(repetition_penalty=1e39),
    "logprobs=-1": greedy(logprobs=-1),
    "prompt_logprobs=-1": greedy(prompt_logprobs=-1),
    "logprob_token_ids=[]": greedy(logprob_token_ids=[]),
    "seed": greedy(seed=2**63 - 1),
    "extra_args": greedy(extra_args={"x": [2**64 - 1, {"y": -(2**63)}], "z": float("nan")}),
}
SERVED = {
    # as nothing can be compared with: other random numbers, or a ruined row
    "seed=2**63-1": sampled(seed=2**63 - 1),
    "seed=-2**63": sampled(seed=-(2**63)),
    "seeds up to 2**63-1": sampled(seed=2**63 - 2, n=2),
    "seed=True": sampled(seed=True),
    "a NumPy seed": sampled(seed=np.int64(5)),
    "top_p=1e-50": sampled(top_p=1e-50),
    "min_p=1e-50": sampled(min_p=1e-50),
    "temperature=1e-50": sampled(temperature=1e-50),
    "repetition_penalty=1e-50": sampled(repetition_penalty=1e-50),
    "repetition_penalty=1e300": sampled(repetition_penalty=1e300),
    "logit_bias=inf": sampled(logit_bias={5: np.inf}),
    "n": sampled(n=20),
}
REFUSED = {
    "seed=2**63": sampled(seed=2**63),
    "seed=2**64": sampled(seed=2**64),
    "seed=10**400": sampled(seed=10**400),
    "seed=-2**63-1": sampled(seed=-(2**63) - 1),
    "seed=2**63 of the second answer": sampled(seed=2**63 - 1, n=2),
    "seed=1.5": sampled(seed=1.5),
    "seed=nan": sampled(seed=float("nan")),
    "seed='7'": sampled(seed="7"),
    "max_tokens=2.5": sampled(max_tokens=2.5),
    "min_tokens=2.5": sampled(min_tokens=2.5),
    "structured_outputs=2**70": sampled(
        structured_outputs=StructuredOutputsParams(json={"type": "integer", "maximum": 2**70})
    ),
    "logit_bias=nan": sampled(logit_bias={5: float("nan")}),
    "logit_bias='1'": sampled(logit_bias={5: "1"}),
    "allowed_token_ids=[1.5]": sampled(allowed_token_ids=[1.5]),
    "logprob_token_ids=[1.5]": sampled(logprob_token_ids=[1.5]),
}


@pytest.fixture(scope="module")
def plain():
    """What plain vLLM answers to ANSWERED, which it does in a process of one."""
    with engine(**OPTIONS) as llm:
        return {
            name: ask(llm, params)
            for name, params in ANSWERED.items()
            if name != "logprob_token_ids=[]"
        } | {"": ask(llm, greedy())}


@pytest.fixture(scope="module")
def llm(plain):
    with engine("binary:3", **OPTIONS) as llm:
        yield llm


def ask(llm, params):
    outputs = llm.generate(PROMPTS[0], params, use_tqdm=False)
    return token_ids(outputs), outputs[0].outputs[0].finish_reason


@pytest.mark.parametrize("name", ANSWERED)
def test_answered_as_plain_vllm_does(llm, plain, name):
    assert ask(llm, ANSWERED[name]) == plain.get(name, plain[""])


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_served(llm, plain, name):
    """The request is answered, and so is the one beside it and the next."""
    outputs = llm.generate(PROMPTS[:1] * 2, [SERVED[name], greedy()], use_tqdm=False)
    assert len(outputs[0].outputs) == SERVED[name].n
    assert token_ids(outputs[1:]) == plain[""][0]
    assert ask(llm, greedy()) == plain[""]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(llm, plain, name):
    with pytest.raises(VLLMValidationError) as error:
        llm.generate(PROMPTS[:2], [greedy(), REFUSED[name]], use_tqdm=False)
    assert str(error.value).startswith(name.partition("=")[0])
    assert "allowed: " in str(error.value)
    assert len(str(error.value)) < 160
    assert len(str(error.value).splitlines()) == 1
    assert not llm.llm_engine.has_unfinished_requests()
    assert ask(llm, greedy()) == plain[""]


def test_what_vllm_itself_checks(llm, plain):
    for params in (
        {"extra_args": {"x": [0, {"y": 2**70}]}},
        {"stop_token_ids": [2**70]},
        {"prompt_logprob_token_ids": [[2**40]] * 3},
        {"logprobs": 2**70},
        {"bad_words": [f"a{i} b c d" for i in range(400)]},
    ):
        with pytest.raises(VLLMValidationError):
            llm.generate(PROMPTS[0], greedy(**params), use_tqdm=False)
        assert ask(llm, greedy()) == plain[""]


@pytest.mark.parametrize("priority", [2**63, -(2**70), 1.5])
def test_priorities(plain, priority):
    with engine("binary:3", **OPTIONS, scheduling_policy="priority") as llm:
        with pytest.raises(VLLMValidationError, match=r"priority=\S+ is not supported"):
            llm.generate(PROMPTS[0], greedy(), use_tqdm=False, priority=[priority])
        assert ask(llm, greedy()) == plain[""]
        outputs = llm.generate(PROMPTS[0], greedy(), use_tqdm=False, priority=[2**63 - 1])
        assert token_ids(outputs) == plain[""][0]


def test_token_ids_without_a_tokenizer(plain):
    """Without one, vLLM 0.32 does not check them, and stops with the engine."""
    params = greedy(detokenize=False)
    refused = r"prompt_token_ids=\S+ .*: 0 to 2047|Token id \S+ is out of vocabulary"
    with engine("binary:3", max_model_len=64, skip_tokenizer_init=True) as llm:
        for token in (2048, -1, 2**31, 2**70):
            with pytest.raises(VLLMValidationError, match=refused):
                llm.generate({"prompt_token_ids": [5, token]}, params, use_tqdm=False)
        prompt = {"prompt_token_ids": tokens_of(PROMPTS[0])}
        assert token_ids(llm.generate(prompt, params, use_tqdm=False)) == plain[""][0]


def test_adapters(tmp_path):
    """Their numbers; and prompt logprobs, for which vLLM's LoRA code for the CPU stops the engine,
    whether the request has an adapter or not."""
    target = models.untied(tmp_path / "target", TARGET)
    path, merged = models.lora_adapter(tmp_path, target, 1)
    lora, too_large = (LoRARequest("adapter", number, path) for number in (2**31 - 1, 2**31))
    options = {"model": target, "enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    scored = {"prompt_logprob_token_ids": [[5]] * (len(tokens_of(PROMPTS[0])) - 1)}
    with engine("binary:3", **options) as llm:
        with pytest.raises(VLLMValidationError, match="lora_int_id=2147483648 is not supported"):
            llm.generate(PROMPTS[:2], greedy(), use_tqdm=False, lora_request=too_large)
        for refused in ({"prompt_logprobs": 1}, scored):
            for adapter in (lora, None):
                with pytest.raises(VLLMValidationError, match="on the CPU with enable_lora"):
                    llm.generate(
                        PROMPTS[0], greedy(**refused), use_tqdm=False, lora_request=adapter
                    )
        answers = llm.generate(PROMPTS, greedy(logprobs=2), use_tqdm=False, lora_request=lora)
    with engine(model=merged) as llm:
        assert token_ids(answers) == token_ids(llm.generate(PROMPTS, greedy(), use_tqdm=False))
