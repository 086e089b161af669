# SPDX-License-Identifier: Apache-2.0
"""What the engine reports: depths as positions, and the slots, widths and fallbacks of trees."""

from itertools import pairwise

import pytest

from helpers.engines import engine, greedy_params
from helpers.metrics import spec_metrics, spechub_metrics
from helpers.pair import PROMPTS
from vllm_spechub.trees.tree import TokenTree

TREE = [0, 0, 0, 1, 1, 2, 4, 4]  # unequal subtrees: depths 1 1 1 2 2 2 3 3
MAX_TOKENS = 30


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_tree_is_counted_as_deep_as_it_is(asynchronous):
    tree = TokenTree.parse(TREE)
    options = {"per_request_spec_decode_metrics": "detailed", "async_scheduling": asynchronous}
    with engine(TREE, max_num_batched_tokens=24, **options) as llm:
        paths = record_paths(llm)
        outputs = llm.generate(PROMPTS, greedy_params(MAX_TOKENS, ignore_eos=True), use_tqdm=False)
        chain, ours = spec_metrics(llm), spechub_metrics(llm)

    emitted = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert emitted == MAX_TOKENS * len(PROMPTS)
    by_depth = chain["num_accepted_tokens_per_pos"]
    assert len(by_depth) == tree.depth
    assert by_depth == sorted(by_depth, reverse=True)
    assert sum(by_depth) == chain["num_accepted_tokens"]
    # whole trees do not fill the budget: some steps verify less deep a tree
    assert chain["num_draft_tokens"] < tree.depth * chain["num_drafts"]

    histogram = ours["emitted_tokens"]
    assert histogram.count == chain["num_drafts"]
    assert histogram.sum == chain["num_accepted_tokens"] + chain["num_drafts"]
    assert [histogram.buckets[f"{n}.0"] for n in range(1, tree.depth + 1)] == [
        chain["num_drafts"] - accepted for accepted in by_depth
    ]
    assert ours["num_nodes"] <= tree.num_nodes * chain["num_drafts"]
    assert sum(ours["steps"].values()) >= int(ours["steps"][str(tree.num_nodes)]) > 0

    slots = ours["num_accepted_tokens_per_slot"]
    assert sum(slots.values()) == chain["num_accepted_tokens"]
    expected = dict.fromkeys(slots, 0)
    for path in paths:
        for parent, node in pairwise(path):
            if node > 0:
                expected[str(node - int(tree.first_child[parent]))] += 1
    assert set(slots) == {"0", "1", "2"}
    # asynchronous steps run ahead of a request's end; what they accepted is not counted
    assert all(slots[slot] <= expected[slot] for slot in slots)
    if not asynchronous:
        assert slots == expected

    drafted = [output.outputs[0].spec_decode_metrics.num_draft_tokens for output in outputs]
    assert sum(drafted) == chain["num_draft_tokens"]
    for output in outputs:
        own = output.outputs[0].spec_decode_metrics
        assert own.num_spec_tokens == tree.depth
        assert len(own.histogram) == tree.depth + 1
        assert set(own.per_step_drafted) <= {1, 2, 3}
        assert max(own.per_step_drafted) == tree.depth


def record_paths(llm) -> list[list[int]]:
    """Every accepted path from now on, straight from the verification rule."""
    from helpers.engines import model_runner

    sampler = model_runner(llm).rejection_sampler
    verify, paths = sampler.rule.verify, []

    def recording(*args, **options):
        verified = verify(*args, **options)
        paths.extend(verified.path.tolist())
        return verified

    sampler.rule.verify = recording
    return paths


def test_requests_without_a_tree_are_counted_with_the_reason():
    # a root and two nodes each: three requests fit into 10 tokens, and one token is left
    with engine("binary:1", max_num_batched_tokens=10, max_model_len=64) as llm:
        llm.generate(["x"] * 8, greedy_params(12, ignore_eos=True), use_tqdm=False)
        budget = spechub_metrics(llm)["fallback_steps"]
        assert budget["budget"] > 0
        assert budget["max_model_len"] == 0
        llm.generate(["x = 1\n" * 8], greedy_params(None, ignore_eos=True), use_tqdm=False)
        assert spechub_metrics(llm)["fallback_steps"]["max_model_len"] > 0
