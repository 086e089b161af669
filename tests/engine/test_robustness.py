# SPDX-License-Identifier: Apache-2.0
"""One engine, with a cache that preempts and priorities, through what may go wrong in it."""

import shutil

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler

from helpers.engines import engine, greedy_params, model_runner, plain_greedy, token_ids
from helpers.pair import DRAFT, PROMPTS
from helpers.soak import GREEDY, known_answers, soak
from vllm_spechub.engine.sampler import TreeRejectionSampler
from vllm_spechub.proposers.draft_model import DraftModelProposer

VOCAB = 2048


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    return shutil.copytree(DRAFT, tmp_path_factory.mktemp("models") / "draft")


@pytest.fixture(scope="module")
def known():
    """What plain vLLM answers to each of PROMPTS, in all greedy ways."""
    with engine() as llm:
        return known_answers(llm, PROMPTS, GREEDY)


@pytest.fixture(scope="module")
def llm(draft, known):
    plain_greedy()  # one engine at a time
    options = {"block_size": 32, "num_gpu_blocks_override": 14, "scheduling_policy": "priority"}
    with engine("binary:3", draft=str(draft), **options) as llm:
        yield llm


def test_a_draft_whose_folder_vanishes(llm, draft):
    """The running engine does not miss it; a new one says what is missing."""
    shutil.rmtree(draft)
    assert (
        token_ids(llm.generate(PROMPTS[:2], greedy_params(), use_tqdm=False))
        == (plain_greedy()[:2])
    )
    with (
        pytest.raises(ValueError, match="there is no folder"),
        engine("binary:3", draft=str(draft)),
    ):
        pass


def test_priorities(llm, monkeypatch):
    """Those that come last are the most urgent and keep their places; nobody's answer changes."""
    core, preempted, answers = llm.llm_engine, [], {}
    original = Scheduler._preempt_request

    def spy(self, request, *args, **kwargs):
        preempted.append(int(request.request_id.split("-")[0]))
        return original(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", spy)
    for i, prompt in enumerate(PROMPTS):
        core.add_request(str(i), prompt, greedy_params(), priority=len(PROMPTS) - i)
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                answers[int(output.request_id)] = list(output.outputs[0].token_ids)
    assert [answers[i] for i in range(len(PROMPTS))] == plain_greedy()
    assert preempted
    assert max(preempted) < len(PROMPTS) // 2


def test_soak(llm, known):
    """The short version of `scripts/soak.py`."""
    report = soak(llm, PROMPTS, known, GREEDY, more=lambda sent: sent < 60)
    assert report.faults() == []
    assert report.compared.keys() == GREEDY.keys()
    assert report.rows_compared > 50
    assert report.preemptions > 0
    assert report.aborted


def test_sleep_and_wake(llm):
    """The CPU platform has no sleep mode; what it would lose on a GPU is lost here by hand."""
    state = model_runner(llm).model_state
    llm.sleep()
    layout = state.layout
    masks = layout.nodes.flat("ancestor_masks")
    for table in (layout._rope_offset, layout._until_offset, masks):
        table.fill_(-1)
    state.compactor.compactors.clear()
    llm.wake_up()
    assert token_ids(llm.generate(PROMPTS, greedy_params(), use_tqdm=False)) == plain_greedy()


def with_nans(llm, monkeypatch, where: str):
    """Every step, the logits of the first and third request are not numbers."""
    if where == "target":
        original = TreeRejectionSampler.__call__

        def spoil(self, logits, batch, *args, **kwargs):
            for r, req_id in enumerate(batch.req_ids):
                if req_id.startswith(("0-", "2-")):
                    start, end = batch.cu_num_logits_np[r : r + 2]
                    logits[start:end] = torch.nan
            return original(self, logits, batch, *args, **kwargs)

        monkeypatch.setattr(TreeRejectionSampler, "__call__", spoil)
    else:
        compute = DraftModelProposer.compute_draft_logits

        def spoil(self, hidden_states, spec_step_idx):
            return torch.full_like(compute(self, hidden_states, spec_step_idx), torch.nan)

        monkeypatch.setattr(DraftModelProposer, "compute_draft_logits", spoil)
    params = [greedy_params(12, ignore_eos=True)] * 2
    params += [
        SamplingParams(temperature=0.9, top_p=0.9, seed=3, max_tokens=12, ignore_eos=True)
    ] * 2
    core, answers = llm.llm_engine, {}
    for i, chosen in enumerate(params):
        core.add_request(str(i), PROMPTS[i], chosen)
    for _ in range(200):
        for output in core.step():
            if output.finished:
                answers[int(output.request_id)] = list(output.outputs[0].token_ids)
        if not core.has_unfinished_requests():
            break
    assert sorted(answers) == [0, 1, 2, 3]
    for answer in answers.values():
        assert len(answer) == 12
        assert all(0 <= token < VOCAB for token in answer)
    return answers


def test_nans_in_the_target(llm, monkeypatch):
    """As in plain vLLM the request goes on with tokens that mean nothing; others are untouched."""
    answers = with_nans(llm, monkeypatch, "target")
    assert answers[1] == plain_greedy()[1][:12]


def test_nans_in_the_draft(llm, monkeypatch):
    """They cost acceptance, never a greedy token."""
    answers = with_nans(llm, monkeypatch, "draft")
    assert [answers[0], answers[1]] == [answer[:12] for answer in plain_greedy()[:2]]
