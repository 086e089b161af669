# SPDX-License-Identifier: Apache-2.0
"""Streaming input: a session's turns continue on the text that was kept of the turn before."""

from functools import cache

import pytest
from vllm import SamplingParams

from helpers.engines import engine
from helpers.oracle import tokens_of

TURNS = [tokens_of(text) for text in ("import os\n", "import sys\n", "def main():\n", "x = 1")]
STOPS = [
    *({"max_tokens": count, "ignore_eos": True} for count in range(1, 8)),
    {"max_tokens": 12, "stop_token_ids": [199, 278, 289]},
]
"""Where a turn ends: at every place within a tree."""


def session(llm, name, stop) -> list[list[int]]:
    """The tokens of every turn, each asked as `AsyncLLM` does when the one before is over."""
    params = SamplingParams(temperature=0, **stop)
    processor, core = llm.llm_engine.input_processor, llm.llm_engine.engine_core
    answers = []
    for tokens in TURNS:
        prompt = {"type": "token", "prompt_token_ids": list(tokens)}
        request = processor.process_inputs(name, prompt, params, ("generate",), resumable=True)
        core.add_request(request)
        answers.append([])
        over = False
        while not over:
            for output in core.get_output().outputs:
                answers[-1] += output.new_token_ids
                over |= output.finish_reason is not None
    core.abort_requests([name])
    return answers


def sessions(llm) -> list[list[list[int]]]:
    return [session(llm, str(i), stop) for i, stop in enumerate(STOPS)]


@cache
def plain():
    with engine() as llm:
        return sessions(llm)


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("tree", ["binary:3", "chain:6"])
def test_turns_equal_plain_vllm(tree, async_scheduling):
    expected = plain()
    assert [len(turn) for turn in expected[6]] == [7] * len(TURNS)
    with engine(tree, async_scheduling=async_scheduling) as llm:
        assert sessions(llm) == expected
