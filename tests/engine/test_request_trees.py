# SPDX-License-Identifier: Apache-2.0
"""Which row of draft logits each request has: never another's, and its own while there is room."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.engines import engine, greedy_params, plain_greedy, token_ids
from helpers.metrics import spec_metrics, spechub_metrics
from helpers.pair import PROMPTS
from vllm_spechub.engine.request_trees import RequestTrees
from vllm_spechub.proposers.draft_model import DraftModelProposer
from vllm_spechub.trees.schedule import TreeSchedule

NUM_REQS = 8
SCHEDULE = TreeSchedule.parse([[1, 2, "binary:2"], [3, 4, "chain:2"], [5, None, "chain:1"]], "rrs")
BATCHES = st.lists(
    st.permutations(range(NUM_REQS)).flatmap(
        lambda reqs: st.integers(1, NUM_REQS).map(lambda count: reqs[:count])
    ),
    max_size=12,
)


def test_a_lost_draft_is_no_tree(monkeypatch):
    """A request whose draft others have replaced decodes as without a tree, and counts as such."""
    propose, lost = DraftModelProposer.propose, []

    def propose_and_lose(self, batch, *args, **kwargs):
        drafted = propose(self, batch, *args, **kwargs)
        if batch.num_reqs == 2 and not kwargs.get("dummy_run"):
            last = batch.idx_mapping_np[-1:]
            self.request_trees._release(last)
            lost.append(last)
        return drafted

    monkeypatch.setattr(DraftModelProposer, "propose", propose_and_lose)
    with engine([[1, 2, "binary:3"], [3, None, "chain:2"]], max_num_seqs=4) as llm:
        answers = token_ids(llm.generate(PROMPTS[:2], greedy_params(), use_tqdm=False))
        metrics, ours = spec_metrics(llm), spechub_metrics(llm)
    assert answers == plain_greedy()[:2]
    assert 0 < ours["fallback_steps"]["lost"] <= len(lost)
    # the other request's trees alone
    assert metrics["num_drafts"] + ours["fallback_steps"]["lost"] < 2 * 40
    assert metrics["num_drafts"] < 40


@given(BATCHES)
def test_rows_of_requests(batches):
    trees = RequestTrees(SCHEDULE, NUM_REQS, torch.device("cpu"))
    most = list(SCHEDULE.most_requests(NUM_REQS).values())
    assert most == [2, 4, 8]
    everyone = np.arange(NUM_REQS)
    for batch in batches:
        reqs, index = np.array(batch), 0 if len(batch) <= 2 else 1 if len(batch) <= 4 else 2
        before = trees.draft_rows_for(everyone).copy()
        trees.record_drafted(reqs, index)
        rows, drafted = trees.draft_rows_for(everyone), trees.index_for(everyone)
        assert (rows[reqs] >= 0).all()
        for place, room in enumerate(most):
            held = rows[(drafted == place) & (rows >= 0)].tolist()
            assert len(held) == len(set(held))
            assert all(row < room for row in held)
        others = np.setdiff1d(everyone, reqs)
        kept = rows[others] == before[others]
        assert (kept | (rows[others] == -1)).all()
        # nobody loses a draft while there is room, nor in another tree
        lost = others[~kept]
        assert (drafted[lost] == index).all()
        if len(lost):
            assert ((drafted == index) & (rows >= 0)).sum() == most[index]
    trees.add_request(0)
    assert trees.draft_rows_for(np.zeros(1, np.int64)) == [-1]
