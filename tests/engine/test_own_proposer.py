# SPDX-License-Identifier: Apache-2.0
"""The proposer in `examples/`, installed as another package would be, in real engines."""

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from helpers.engines import engine, greedy_params, model_runner, plain_greedy, token_ids
from helpers.metrics import spec_metrics
from helpers.pair import PROMPTS
from helpers.third_party import PROPOSER, installed_examples
from vllm_spechub.proposers.base import TreeProposer

OWN_TEXT = {"draft": None, "spec": {"proposer": PROPOSER}}


@pytest.fixture(autouse=True)
def installed(tmp_path):
    with installed_examples(tmp_path):
        yield


@pytest.fixture
def accepted(monkeypatch):
    """Of every verified tree what its proposer is told: the accepted nodes, the last one's hidden
    state, and the new root's token. The accepted tokens are checked here."""
    told: list[tuple[list[int], torch.Tensor, int]] = []
    original = TreeProposer._step

    def spy(self, batch, *args):
        step = original(self, batch, *args)
        assert (step.accepted_paths is None) == (not batch.num_draft_tokens)
        if step.dummy_run or step.accepted_paths is None:
            return step
        trees = (batch.num_draft_tokens_per_req > 0) & ~batch.is_prefilling_np
        for r in np.flatnonzero(trees):
            root = int(step.root_positions[r])
            nodes = [node for node in step.accepted_paths[r].tolist() if node >= 0]
            text = self.req_states.all_token_ids.gpu[batch.idx_mapping[r], : root + 1].tolist()
            rows = batch.query_start_loc[r] + torch.tensor(nodes)
            # the old root and the accepted tokens, then the new root
            assert text[-1 - len(nodes) : -1] == batch.input_ids[rows].tolist()
            told.append((nodes, step.hidden_states[rows[-1]].clone(), text[-1]))
        return step

    monkeypatch.setattr(TreeProposer, "_step", spy)
    return told


def test_greedy_tokens_are_plain_vllms(accepted):
    with engine("kary:2:3", verification="traversal", **OWN_TEXT) as llm:
        answers = token_ids(llm.generate(PROMPTS, greedy_params(), use_tqdm=False))
        metrics = spec_metrics(llm)
        paths, hidden, roots = zip(*accepted, strict=True)
        logits = model_runner(llm).model.compute_logits(torch.stack(hidden))
    assert answers == plain_greedy()
    assert logits.argmax(dim=1).tolist() == list(roots)
    # accepted nodes need not stand right after the root
    assert sum(nodes != list(range(len(nodes))) for nodes in paths) > 10
    # the prompts, and code in general, repeat themselves
    assert metrics["num_accepted_tokens"] > 0.3 * metrics["num_drafts"]


@pytest.mark.usefixtures("accepted")
def test_a_schedule_and_sampling_parameters():
    """Trees come and go, rows are truncated, and requests end at the end of the context."""
    schedule = [[1, 2, "binary:3"], [3, 4, "chain:2"], [5, None, None]]
    params = [
        SamplingParams(temperature=0.8, top_k=20, seed=5, max_tokens=length, ignore_eos=True)
        for length in (8, 14, 20, 26, 34, 200)
    ]
    with engine(schedule, max_model_len=192, async_scheduling=True, **OWN_TEXT) as llm:
        together = llm.generate(PROMPTS, params, use_tqdm=False)
        metrics = spec_metrics(llm)
    assert together[-1].outputs[0].finish_reason == "length"
    assert len(together[-1].prompt_token_ids) + len(together[-1].outputs[0].token_ids) == 192
    assert metrics["num_accepted_tokens"] > 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"model": "some/draft"}, r"\['model'\] is 'some/draft', but proposer 'bigrams' loads no"),
        ({"bigram_smoothing": 0.0}, r"\['bigram_smoothing'\] is 0.0, allowed: a number above 0"),
        ({"smoothing": 0.1}, r"\['smoothing'\] is not an option .*bigram_smoothing"),
        ({"proposer": "draft_model", "bigram_smoothing": 0.1}, r"'bigram_smoothing'\] is not an"),
    ],
)
def test_options_are_checked(spec, message):
    with (
        pytest.raises(ValueError, match=message),
        engine("binary:2", draft=None, spec={"proposer": PROPOSER} | spec),
    ):
        pass
