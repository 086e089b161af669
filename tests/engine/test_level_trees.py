# SPDX-License-Identifier: Apache-2.0
"""Trees that each request's step decides: what only they can get wrong in an engine."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from vllm import SamplingParams

from helpers.engines import engine, token_ids
from helpers.metrics import spec_metrics
from helpers.oracle import reference_exit, reference_model
from helpers.pair import DRAFT, PROMPTS, TARGET
from helpers.recording import recorded_nodes, request_of
from vllm_spechub.engine.sampler import TreeRejectionSampler
from vllm_spechub.proposers.base import TreeProposer

LEVELS = "levels:3,4,4"
SEEDED = SamplingParams(temperature=0.8, seed=3, max_tokens=24, ignore_eos=True)


def answers(tree=LEVELS, prompts=PROMPTS, **options):
    with engine(tree, verification="mixed", **options) as llm:
        return token_ids(llm.generate(prompts, SEEDED, use_tqdm=False))


def test_a_seed_gives_the_same_tokens_in_any_batch():
    with engine(LEVELS, verification="mixed") as llm:
        together, alone = (
            token_ids(llm.generate(prompts, SEEDED, use_tqdm=False))
            for prompts in (PROMPTS, PROMPTS[2:3])
        )
    assert together[2:3] == alone


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        pytest.param({}, partial(reference_model, DRAFT), id="draft model"),
        pytest.param(
            {"draft": None, "spec": {"proposer": "early_exit", "exit_layer": 1}},
            partial(reference_exit, TARGET, 1),
            id="early exit",
        ),
    ],
)
def test_requests_of_a_batch_have_trees_of_their_own(options, reference):
    """And the draft reads each node after its own path."""
    with recorded_nodes() as nodes, engine(LEVELS, verification="mixed", **options) as llm:
        outputs = llm.generate(PROMPTS, SEEDED, use_tqdm=False)
    by_step: dict[tuple[str, int], set] = {}
    for node in nodes:
        by_step.setdefault((node.req_id, node.root_position), set()).add(node.tree.parents)
    assert all(len(trees) == 1 for trees in by_step.values())
    assert len({trees.pop() for trees in by_step.values()}) > 20

    texts = {
        output.request_id: [*output.prompt_token_ids, *output.outputs[0].token_ids]
        for output in outputs
    }
    inner = [node for node in nodes if node.draft_logits is not None]
    assert {len(node.path_tokens) for node in inner} == {0, 1, 2}
    for node in inner[::23]:
        text = texts[request_of(node.req_id)][: node.root_position + 1]
        tokens = torch.tensor([[*text, *node.path_tokens]])
        expected = reference()(input_ids=tokens).logits[0, -1]
        torch.testing.assert_close(node.draft_logits, expected, atol=2e-4, rtol=1e-4)


def test_every_accepted_node_is_counted_by_its_slot(monkeypatch):
    """As the tree says that was verified."""
    by_slot, call = [0] * 4, TreeRejectionSampler.__call__

    def spy(self, logits, batch, draft, invalid_drafts=None):
        output = call(self, logits, batch, draft, invalid_drafts)
        (state,) = draft.states
        paths = output.accepted_paths.tolist()
        for req, path in zip(batch.idx_mapping.tolist(), paths, strict=True):
            for above, node in pairwise(path):
                if node > 0:
                    siblings = (state.tables.parents[req, 1:] == above).nonzero().flatten() + 1
                    by_slot[siblings.tolist().index(node)] += 1
        return output

    monkeypatch.setattr(TreeRejectionSampler, "__call__", spy)
    with engine(LEVELS, verification="mixed") as llm:
        llm.generate(PROMPTS, SEEDED, use_tqdm=False)
        metrics = spec_metrics(llm)
        counted = [0] * 4
        for metric in llm.get_metrics():
            if metric.name == "vllm:spechub_num_accepted_tokens_per_slot":
                counted[int(metric.labels["slot"])] += metric.value
    assert sum(counted) == metrics["num_accepted_tokens"]
    assert counted == by_slot
    assert min(counted[:3]) > 0


def test_a_schedule_may_hold_both_kinds():
    """Rows that are given to requests, and requests that keep another tree for a step."""
    schedule = [[1, 2, LEVELS], [3, 4, "levels:2,3"], [5, None, "binary:2"]]
    lengths = (6, 12, 20, 30, 40, 50)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    with engine(schedule, verification="mixed") as llm:
        found = token_ids(llm.generate(PROMPTS, params, use_tqdm=False))
        metrics = spec_metrics(llm)
    with engine() as llm:
        assert found == token_ids(llm.generate(PROMPTS, params, use_tqdm=False))
    assert metrics["num_accepted_tokens"] > 20


def test_large_batches_are_drafted_in_parts(monkeypatch):
    """Each part's requests have trees of their own, too."""
    whole = answers()
    init = TreeProposer.__init__

    def narrow(self, *args):
        init(self, *args)
        self.max_rows = 8

    monkeypatch.setattr(TreeProposer, "__init__", narrow)
    assert answers() == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tree": "levels:3,20"}, "a level of 20 below one of 3 needs more than 4 children"),
        ({"tree": "levels:3,0"}, "every width must be at least 1"),
        ({"tree": LEVELS, "verification": "rrs"}, "not shown to be lossless; allowed with"),
        ({"tree": LEVELS, "verification": "chain"}, "takes one child per node"),
        ({"tree": LEVELS, "spec": {"proposer": "ngram"}, "draft": None}, "drafts static trees"),
    ],
)
def test_what_level_widths_refuse(options, message):
    with pytest.raises(ValueError, match=message), engine(**options):
        pass
