# SPDX-License-Identifier: Apache-2.0
"""At temperature 0 the tokens equal plain vLLM's, whatever the tree and however it is cut."""

import pytest

from helpers.engines import engine, greedy_params, plain_greedy, token_ids
from helpers.metrics import spec_metrics
from helpers.pair import PROMPTS, TARGET

IRREGULAR = [0, 0, 0, 1, 1, 2, 4, 4, 4, 4, 6, 11]


@pytest.mark.parametrize(
    ("tree", "verification"),
    [
        ("chain:3", "ordered"),
        ("binary:1", "unordered"),
        ("binary:3", "ordered"),
        ("binary:3", "unordered"),
        ("kary:4:2", "ordered"),
        ("caterpillar:5:3", "ordered"),
        (IRREGULAR, "ordered"),
        (IRREGULAR, "unordered"),
        (IRREGULAR, "traversal"),
        (IRREGULAR, "mixed"),
        ("kary:4:2", "match"),
        ("binary:5", "ordered"),
    ],
)
def test_tree_shapes(tree, verification):
    with engine(tree, verification=verification) as llm:
        answers = token_ids(llm.generate(PROMPTS, greedy_params(), use_tqdm=False))
        metrics = spec_metrics(llm)
    assert answers == plain_greedy()
    # the trees were used
    assert metrics["num_accepted_tokens"] > 0.2 * metrics["num_drafts"]


@pytest.mark.parametrize("block_size", [32, 64, 96])
def test_block_sizes(block_size):
    with engine("binary:3", block_size=block_size) as llm:
        answers = token_ids(llm.generate(PROMPTS, greedy_params(), use_tqdm=False))
    assert answers == plain_greedy()


@pytest.mark.parametrize("budget", [24, 30, 41])
def test_tight_budgets_truncate_trees(budget, monkeypatch):
    from vllm_spechub.engine.sampler import TreeRejectionSampler

    truncated = []
    original = TreeRejectionSampler.__call__

    def spy(self, logits, batch, *args):
        drafts = batch.num_draft_tokens_per_req
        truncated.extend(drafts[(drafts > 0) & (drafts < 14)].tolist())
        return original(self, logits, batch, *args)

    monkeypatch.setattr(TreeRejectionSampler, "__call__", spy)
    with engine("binary:3", max_num_batched_tokens=budget) as llm:
        answers = token_ids(llm.generate(PROMPTS, greedy_params(), use_tqdm=False))
    assert answers == plain_greedy()
    assert len(truncated) >= 8


def test_preemption():
    with engine() as llm:
        expected = token_ids(llm.generate(PROMPTS, greedy_params(60), use_tqdm=False))
    with engine("binary:3", block_size=32, num_gpu_blocks_override=14) as llm:
        answers = token_ids(llm.generate(PROMPTS, greedy_params(60), use_tqdm=False))
        preemptions = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    assert answers == expected
    assert preemptions[0] > 0


def test_prefix_cache_reuse():
    """A request that continues an answer reads KV that trees wrote and moved."""
    with engine("binary:3", block_size=32) as llm:
        first = llm.generate(PROMPTS, greedy_params(60), use_tqdm=False)
        longer = [
            {"prompt_token_ids": list(o.prompt_token_ids) + list(o.outputs[0].token_ids)[:50]}
            for o in first
        ]
        again = llm.generate(longer, greedy_params(30), use_tqdm=False)
    assert all(o.num_cached_tokens >= 32 for o in again)
    with engine(enable_prefix_caching=False) as llm:
        expected = token_ids(llm.generate(longer, greedy_params(30), use_tqdm=False))
    assert token_ids(again) == expected


def test_max_model_len_and_max_tokens():
    options = {"max_model_len": 200, "max_num_batched_tokens": 512}
    ignore_eos = greedy_params(512, ignore_eos=True)
    lengths = [greedy_params(n, ignore_eos=True) for n in (1, 2, 3, 4, 5, 7)]
    with engine(**options) as llm:
        expected = token_ids(llm.generate(PROMPTS, ignore_eos, use_tqdm=False))
        short = token_ids(llm.generate(PROMPTS, lengths, use_tqdm=False))
    with engine("binary:3", **options) as llm:
        assert token_ids(llm.generate(PROMPTS, ignore_eos, use_tqdm=False)) == expected
        assert token_ids(llm.generate(PROMPTS, lengths, use_tqdm=False)) == short


def test_async_scheduling():
    with engine("binary:3", async_scheduling=True) as llm:
        core = llm.llm_engine.engine_core.engine_core
        assert type(core.scheduler).__name__ == "AsyncTreeScheduler"
        answers = token_ids(llm.generate(PROMPTS, greedy_params(), use_tqdm=False))
    assert answers == plain_greedy()


def test_perfect_draft_is_accepted_to_full_depth():
    params = greedy_params(41, ignore_eos=True)
    with engine("binary:3", draft=TARGET) as llm:
        llm.generate(PROMPTS, params, use_tqdm=False)
        metrics = spec_metrics(llm)
    # 41 tokens: one from the prompt's step, then ten steps of four
    assert metrics["num_drafts"] == 10 * len(PROMPTS)
    assert metrics["num_accepted_tokens"] == 30 * len(PROMPTS)


def test_aborted_requests():
    with engine("binary:3") as llm:
        core = llm.llm_engine
        free_blocks = core.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        before = free_blocks.get_num_free_blocks()
        for i, prompt in enumerate(PROMPTS):
            core.add_request(str(i), prompt, greedy_params())
        answers = {}
        for step in range(200):
            for output in core.step():
                if output.finished:
                    answers[output.request_id] = list(output.outputs[0].token_ids)
            if step == 3:
                core.abort_request(["0", "3"])
            if not core.has_unfinished_requests():
                break
        core.step()
        assert free_blocks.get_num_free_blocks() == before
    assert answers == {str(i): plain_greedy()[i] for i in (1, 2, 4, 5)}
