# SPDX-License-Identifier: Apache-2.0
"""Trees that follow the number of running requests: tokens, rows and the draft's own reading."""

import pytest
import torch
from vllm import SamplingParams

from helpers.distributions import assert_prefixes_follow
from helpers.engines import engine, token_ids
from helpers.metrics import spec_metrics, spechub_metrics
from helpers.oracle import assert_same_row, processed_row, reference_model, resolved
from helpers.pair import PROMPTS, TARGET
from helpers.recording import recorded_nodes, request_of
from helpers.schedules import SCHEDULE, params
from vllm_spechub.engine.sampler import TreeRejectionSampler
from vllm_spechub.rules.kernel_rule import KernelRule
from vllm_spechub.trees.schedule import TreeSchedule
from vllm_spechub.trees.tree import TokenTree

# the other way round: wide trees leave most requests out of a tight budget, chains let them in
MIXING = [[1, 12, "chain:2"], [13, 20, None], [21, 30, "kary:3:1"], [31, None, "binary:3"]]


def generate(llm, **options):
    return token_ids(llm.generate(PROMPTS, params(**options), use_tqdm=False))


@pytest.fixture
def emitted_by_tree(monkeypatch):
    """Of each verified batch, what its requests emitted, by their tree's place in the schedule.

    Each request must be verified as the tree that it drafted.
    """
    batches: list[dict[int, list[int]]] = []
    original, verify = TreeRejectionSampler.__call__, KernelRule.verify
    drafts: set[tuple[TokenTree, int]] = set()

    def check(self, target, requests, state):
        for row in requests.req_idx[target.num_nodes > 0].tolist():
            assert (state.tree, row) in drafts
        return verify(self, target, requests, state)

    def spy(self, logits, batch, *args, **kwargs):
        reqs = batch.idx_mapping_np
        rows = self.request_trees.draft_rows_for(reqs).tolist()
        drafts.clear()
        drafts.update(zip(self.request_trees.trees_for(reqs), rows, strict=True))
        with monkeypatch.context() as patch:  # the worker's warm-up verifies, too
            patch.setattr(KernelRule, "verify", check)
            output = original(self, logits, batch, *args, **kwargs)
        emitted: dict[int, list[int]] = {}
        for r, index in enumerate(self.request_trees.index_for(batch.idx_mapping_np).tolist()):
            if batch.num_draft_tokens_per_req[r] > 0:
                emitted.setdefault(index, []).append(int(output.num_sampled[r]))
        batches.append(emitted)
        return output

    monkeypatch.setattr(TreeRejectionSampler, "__call__", spy)
    return batches


@pytest.fixture(scope="module")
def plain():
    """Plain vLLM's tokens, without and with processors that read each token's history."""
    with engine() as llm:
        return {name: generate(llm, **options) for name, options in SETTINGS.items()}


SETTINGS = {
    "greedy": {},
    "history": {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logprobs": 2},
}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_tokens_while_the_width_changes(asynchronous, plain):
    options = {"per_request_spec_decode_metrics": "detailed", "async_scheduling": asynchronous}
    with engine(SCHEDULE, **options) as llm:
        for name, options in SETTINGS.items():
            assert generate(llm, **options) == plain[name], name
        outputs = llm.generate(PROMPTS, params(), use_tqdm=False)
        ours = spechub_metrics(llm)
    assert {"2", "14"} <= set(ours["steps"])
    assert all(ours["steps"][width] > 5 for width in ("2", "14"))
    assert ours["fallback_steps"]["load"] > 5
    # the last request drafts chains first, then trees
    last = outputs[-1].outputs[0].spec_decode_metrics
    assert {2, 3} <= set(last.per_step_drafted) <= {1, 2, 3}


@pytest.mark.parametrize("budget", [18, 24])
def test_one_batch_may_mix_trees(budget, plain, emitted_by_tree):
    """Requests that a tight budget leaves out of a step keep the tree of their last one."""
    schedule = [[1, 2, "chain:2"], [3, None, "binary:3"]]
    with engine(schedule, max_num_batched_tokens=budget) as llm, recorded_nodes() as nodes:
        assert generate(llm) == plain["greedy"]
        penalized = params(temperature=1.0, seed=1, repetition_penalty=1.5)
        outputs = llm.generate(PROMPTS, penalized, use_tqdm=False)
    mixed = [emitted for emitted in emitted_by_tree if len(emitted) == 2]
    for tree in (0, 1):  # both trees of a mixed batch are accepted from
        assert max(max(emitted[tree]) for emitted in mixed) > 1

    by_request = {output.request_id: output for output in outputs}
    checked, settings = 0, resolved(penalized[0])
    for node in nodes[:: len(nodes) // 80]:
        output = by_request.get(request_of(node.req_id))
        if output is None:  # of the greedy answers
            continue
        prompt = list(output.prompt_token_ids)
        text = [*prompt, *output.outputs[0].token_ids][: node.root_position + 1]
        path = [*text, *node.path_tokens]
        row = reference_model()(input_ids=torch.tensor([path])).logits[0, -1]
        torch.testing.assert_close(node.logits, row, atol=5e-4, rtol=1e-4)
        expected = processed_row(node.logits, prompt, path[len(prompt) :], settings)
        assert_same_row(node.processed / node.temperature, expected)
        checked += 1
    assert checked > 20


@pytest.mark.parametrize("budget", [512, 16])
def test_the_draft_reads_what_it_missed(budget):
    """A draft equal to the target is accepted whole, unless its KV cache has a gap."""
    emitted: list[int] = []
    original = TreeRejectionSampler.__call__

    def spy(self, logits, batch, *args, **kwargs):
        output = original(self, logits, batch, *args, **kwargs)
        if batch.num_reqs == 1:
            emitted.append(int(output.num_sampled[0]))
        return output

    schedule = [[1, 1, "chain:3"], [2, None, None]]
    lengths = [90, 50, 50, 50]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TreeRejectionSampler, "__call__", spy)
        options = {"draft": TARGET, "max_num_batched_tokens": budget, "max_num_seqs": 4}
        with engine(schedule, **options) as llm:
            # the second time in places whose requests ended before their drafts had caught up
            for order in (lengths, lengths[::-1]):
                emitted.clear()
                wanted = params()[:4]
                for own, length in zip(wanted, order, strict=True):
                    own.max_tokens = length
                llm.generate(PROMPTS[:4], wanted, use_tqdm=False)
                # Alone, the longest request has some 40 tokens to go. Its draft has missed some
                # 50, which do not fit into one step of 16 + 4 rows.
                late = 1 if budget == 512 else 4
                assert len(emitted[late:-1]) >= 4
                assert emitted[late:-1] == [4] * len(emitted[late:-1])


def test_prefixes_follow_the_target_while_the_width_changes(emitted_by_tree):
    prompt = [5, 6, 7]
    samples = 2000
    wanted = SamplingParams(n=samples, max_tokens=4, ignore_eos=True, temperature=0.6)
    options = {"max_num_seqs": 96, "max_num_batched_tokens": 160}
    with engine(MIXING, verification="traversal", **options) as llm:
        output = llm.generate({"prompt_token_ids": prompt}, wanted, use_tqdm=False)[0]
        steps = spechub_metrics(llm)["steps"]
    assert {"2", "3", "14"} <= set(steps)
    assert sum(len(emitted) > 1 for emitted in emitted_by_tree) > 30
    assert_prefixes_follow(output, prompt, wanted)


def test_requests_whose_drafts_found_no_room(monkeypatch, plain):
    """They decode plainly in that step. Rows are short here as they are when many requests keep
    the drafts of steps that they missed."""
    most = dict.fromkeys(TreeSchedule.parse([[1, None, "binary:3"]], "rrs").trees, 3)
    monkeypatch.setattr(TreeSchedule, "most_requests", lambda self, max_num_reqs: most)
    # while all run, the last three have no room: two greedy ones, and one that is not
    hot = params(temperature=2.0, seed=1)
    requests = [*hot[:3], *params()[3:5], hot[5]]
    with engine("binary:3", verification="traversal") as llm:
        answers = token_ids(llm.generate(PROMPTS, requests, use_tqdm=False))
        metrics = spec_metrics(llm)
    assert answers[3:5] == plain["greedy"][3:5]
    assert metrics["num_accepted_tokens"] > 10
