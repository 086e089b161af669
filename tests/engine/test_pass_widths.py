# SPDX-License-Identifier: Apache-2.0
"""No pass of the draft is wider than max_num_batched_tokens, which vLLM compiles nothing for."""

import pytest
import torch
from vllm.config import CompilationMode
from vllm.platforms.cpu import CpuPlatform

from helpers.engines import engine, model_runner, plain_greedy, token_ids
from helpers.metrics import spec_metrics
from helpers.pair import EXIT_TARGET, PROMPTS
from helpers.schedules import params
from vllm_spechub.proposers import base
from vllm_spechub.proposers.draft_model import DraftModelProposer

# six requests draft nothing, then four draft levels of nine nodes, and the last one a chain
SCHEDULE = [[1, 1, "chain:8"], [2, 4, "kary:3:3"], [5, None, None]]
BUDGET = 40  # vLLM 0.33 refuses less than a tree's 39 nodes and its root


@pytest.fixture
def widths(monkeypatch):
    """The number of tokens of each pass of the draft."""
    found: list[int] = []
    run_model = DraftModelProposer.run_model

    def spy(self, tokens, *args):
        found.append(len(tokens))
        return run_model(self, tokens, *args)

    monkeypatch.setattr(DraftModelProposer, "run_model", spy)
    return found


@pytest.fixture
def compiled(monkeypatch):
    """Engines on the CPU that vLLM compiles piece by piece, as on CUDA, with its ranges of widths;
    what it compiles to is PyTorch itself."""
    check = CpuPlatform.check_and_update_config

    def as_on_cuda(cls, vllm_config):
        check(vllm_config)
        compilation = vllm_config.compilation_config
        compilation.mode, compilation.backend = CompilationMode.VLLM_COMPILE, "eager"
        compilation.compile_sizes = []
        passes = compilation.pass_config  # vLLM has their classes on GPUs only
        passes.fuse_norm_quant = passes.fuse_act_quant = passes.fuse_attn_quant = False

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(as_on_cuda))
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")


def answers(llm):
    return token_ids(llm.generate(PROMPTS, params(), use_tqdm=False))


def assert_greedy(found):
    for ours, plain in zip(found, plain_greedy(42), strict=True):
        assert ours == plain[: len(ours)]


@pytest.mark.parametrize(
    ("tree", "budget"), [(SCHEDULE, BUDGET), ("kary:3:3", 64), ("kary:2:4", 31)]
)
def test_a_pass_is_as_wide_as_the_budget_at_most(tree, budget, widths):
    """Also the passes that profile the memory, of as many requests as there may be."""
    with engine(tree, max_num_batched_tokens=budget) as llm:
        model_runner(llm).profile_run()
        profiled = max(widths)
        found = answers(llm)
    assert budget / 2 < profiled
    assert max(widths) <= budget
    assert_greedy(found)


def test_vllms_ranges_of_compiled_widths(compiled, widths):
    with engine(SCHEDULE, enforce_eager=False, max_num_batched_tokens=BUDGET + 2) as llm:
        assert_greedy(answers(llm))
        assert len(set(widths)) > 6
        # the assertion that a wider pass would meet is in force
        run_model = model_runner(llm).speculator.run_model
        tokens = torch.zeros(BUDGET + 3, dtype=torch.int32)
        with pytest.raises(AssertionError, match="out of considered ranges"):
            run_model(tokens, tokens.long(), None, None, None)


def test_the_targets_first_layers_are_compiled_by_themselves(compiled):
    """Not with the code of the whole target, which is of the same class."""
    spec, requests = {"proposer": "early_exit", "exit_layer": 2}, params()[:3]
    answers = []
    for eager in (False, True):
        options = {"model": EXIT_TARGET, "draft": None, "spec": spec, "enforce_eager": eager}
        with engine("binary:2", **options) as llm:
            outputs = llm.generate(PROMPTS[:3], requests, use_tqdm=False)
            answers.append((token_ids(outputs), spec_metrics(llm)["num_accepted_tokens"]))
            runner = model_runner(llm)
            target, early = runner.model.model, runner.speculator.model.model
            assert early.end_layer == 2 < target.end_layer == 8
            if not eager:
                assert target.compiled
                assert early.compiled
                assert early._compiled_callable is not target._compiled_callable
    assert answers[0] == answers[1]


def test_requests_that_are_drafted_part_by_part(monkeypatch):
    """Neither trees nor what is accepted of them depend on it, whatever requests ask for."""
    requests = [
        *params()[:2],
        *params(temperature=1.0, seed=1)[2:4],
        *params(temperature=1.0, seed=2, top_p=0.7)[4:],
    ]
    outcomes = []
    for rows in (1000, 9):  # of logits, at most: 9 for two requests and a level of four nodes
        monkeypatch.setattr(base, "get_max_chunk_logits", lambda _vocab_size, rows=rows: rows)
        with engine("binary:3", verification="traversal") as llm:
            outputs = llm.generate(PROMPTS, requests, use_tqdm=False)
            outcomes.append((token_ids(outputs), spec_metrics(llm)))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1]["num_accepted_tokens"] > 50
