# SPDX-License-Identifier: Apache-2.0
"""Above temperature 0 the emitted prefixes have exactly the target's distribution."""

from dataclasses import replace

import pytest
from vllm import SamplingParams

from helpers.distributions import LENGTHS, SAMPLES, assert_prefixes_follow
from helpers.engines import engine, greedy_params, plain_greedy, token_ids
from helpers.metrics import spec_metrics
from helpers.oracle import tokens_of
from helpers.pair import EAGLE3, PROMPTS, TARGET
from vllm_spechub.engine.sampler import TreeRejectionSampler

WIDE = [0, 0, 0, 0, 1, 1, 2, 5]
LEVELS = "levels:3,4,4"


@pytest.mark.parametrize(
    ("tree", "verification", "params"),
    [
        ("binary:3", "unordered", {"temperature": 0.7}),
        ("binary:3", "ordered", {"temperature": 0.6, "top_k": 20, "top_p": 0.9}),
        ("chain:3", "ordered", {"temperature": 0.7, "min_p": 0.0}),
    ],
)
def test_prefixes_follow_the_target(tree, verification, params):
    prompt = tokens_of(PROMPTS[4])
    params = SamplingParams(n=SAMPLES, max_tokens=LENGTHS[-1], ignore_eos=True, **params)
    options = {"max_num_seqs": 128, "max_num_batched_tokens": 4096}
    with engine(tree, verification=verification, **options) as llm:
        output = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0]
        metrics = spec_metrics(llm)
    assert metrics["num_accepted_tokens"] > 0.3 * SAMPLES

    assert_prefixes_follow(output, prompt, params)


UNEQUAL = [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("tree", "verification", "spec"),
    [
        (UNEQUAL, "traversal", None),
        ("binary:2", "traversal", {"sharpening": 1.5}),
        (WIDE, "mixed", None),
        ("kary:3:2", "mixed", {"sharpening": 1.4}),
        (UNEQUAL, "ordered", None),
        (WIDE, "unordered", None),
        (UNEQUAL, "rrs", None),
        (UNEQUAL, "rrsw", None),
        ("chain:3", "chain", None),
        (WIDE, "match", None),
        (LEVELS, "mixed", None),
        ("levels:2,4,3", "traversal", {"sharpening": 1.3, "model": EAGLE3}),
    ],
)
def test_rules(tree, verification, spec):
    """Two temperatures, and plain vLLM's tokens at temperature 0, from one engine per rule."""
    prompt, each = tokens_of(PROMPTS[4]), 600
    params = [
        SamplingParams(n=each, max_tokens=LENGTHS[-1], ignore_eos=True, temperature=temperature)
        for temperature in (0.5, 1.0)
    ]
    options = {"max_num_seqs": 128, "max_num_batched_tokens": 4096}
    with engine(tree, verification=verification, spec=spec, **options) as llm:
        answers = token_ids(llm.generate(PROMPTS, greedy_params(), use_tqdm=False))
        prompts = [{"prompt_token_ids": prompt}] * len(params)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        metrics = spec_metrics(llm)
    assert answers == plain_greedy()
    assert metrics["num_accepted_tokens"] > 0.4 * metrics["num_drafts"]
    for output, asked in zip(outputs, params, strict=True):
        assert_prefixes_follow(output, prompt, asked)


TRUNCATED = [
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 3, "temperature": 1.4},
    {"top_p": 0.3},
    {"min_p": 0.25, "temperature": 1.3},
    {"top_p": 0.7, "repetition_penalty": 1.4, "frequency_penalty": 0.6, "bad_words": [" self"]},
    {"min_p": 0.02, "logit_bias": {278: 2.0, 199: -3.0}, "temperature": 0.8},
]


@pytest.mark.parametrize(
    ("tree", "verification", "chosen"),
    [
        (WIDE, "ordered", [0, 1, 3, 5]),
        (WIDE, "unordered", [1, 2, 4, 6]),
        (WIDE, "traversal", [0, 2, 4, 5]),
        (WIDE, "mixed", [1, 3, 5, 6]),
        (LEVELS, "mixed", [2, 5]),
    ],
)
def test_truncated_drafts_follow_the_target(tree, verification, chosen):
    """In one batch; often the draft keeps fewer tokens than a node has children."""
    prompt, each = tokens_of(PROMPTS[4]), 400
    params = [
        SamplingParams(n=each, max_tokens=LENGTHS[-1], ignore_eos=True, **options)
        for options in (TRUNCATED[i] for i in chosen)
    ]
    options = {"max_num_seqs": 128, "max_num_batched_tokens": 4096}
    with engine(tree, verification=verification, **options) as llm:
        prompts = [{"prompt_token_ids": prompt}] * len(params)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        metrics = spec_metrics(llm)
    assert metrics["num_accepted_tokens"] > 0.8 * metrics["num_drafts"]
    for output, asked in zip(outputs, params, strict=True):
        assert_prefixes_follow(output, prompt, asked)


@pytest.mark.parametrize(
    ("tree", "verification"), [(WIDE, "mixed"), (WIDE, "traversal"), (LEVELS, "mixed")]
)
def test_trees_cut_by_a_budget_follow_the_target(tree, verification):
    """Many trees lose some of a node's children, and all that comes after."""
    prompt = [5, 6, 7]  # short, so that more requests start than have room for their trees
    params = SamplingParams(n=500, max_tokens=LENGTHS[-1], ignore_eos=True, temperature=0.8)
    drafted: list[int] = []
    original = TreeRejectionSampler.__call__

    def spy(self, logits, batch, *args, **kwargs):
        drafted.extend(batch.num_draft_tokens_per_req.tolist())
        return original(self, logits, batch, *args, **kwargs)

    options = {"max_num_seqs": 24, "max_num_batched_tokens": 24}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TreeRejectionSampler, "__call__", spy)
        with engine(tree, verification=verification, **options) as llm:
            num_nodes = llm.llm_engine.vllm_config.num_speculative_tokens
            output = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0]
    assert sum(0 < count < num_nodes for count in drafted) > 100
    assert_prefixes_follow(output, prompt, params)


def test_truncation_costs_no_acceptance(monkeypatch):
    """A draft that equals the target is accepted to full depth, truncated like the target only."""
    from vllm_spechub.proposers import base

    params = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=41, ignore_eos=True, **truncation)
        for i, truncation in enumerate([{"top_p": 0.5}, {"top_k": 2}, {"min_p": 0.3}] * 2)
    ]
    depths = []  # mean accepted tokens per tree, of a tree of depth 3
    before = {}
    with engine("binary:3", draft=TARGET) as llm:
        for truncate in (base.truncate, lambda *args: None):
            monkeypatch.setattr(base, "truncate", truncate)
            llm.generate(PROMPTS, params, use_tqdm=False)
            after = spec_metrics(llm)
            accepted, drafts = (
                after[key] - before.get(key, 0) for key in ("num_accepted_tokens", "num_drafts")
            )
            depths.append(accepted / drafts)
            before = after
    assert depths[0] > 2.97
    assert depths[1] < 2.7


@pytest.mark.parametrize("tree", ["binary:3", "caterpillar:4:3"])
def test_a_seed_fixes_the_tokens(tree):
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=30, ignore_eos=True)
    other = SamplingParams(temperature=1.0, seed=12, max_tokens=30, ignore_eos=True)
    with engine(tree) as llm:
        first, again, third = (
            [o.outputs[0].token_ids for o in llm.generate(PROMPTS, p, use_tqdm=False)]
            for p in (params, params, other)
        )
        alone = llm.generate(PROMPTS[2], params, use_tqdm=False)[0].outputs[0].token_ids
    assert first == again
    assert first[2] == alone
    assert all(a != b for a, b in zip(first, third, strict=True))


def test_the_checked_entry_points_take_what_the_engine_passes(monkeypatch):
    """On CUDA the engine calls `triton_kernels`, whose references must sample the same tokens."""
    from vllm_spechub.integration.platforms import PLATFORMS
    from vllm_spechub.rules.kernel_rule import PORTABLE_KERNELS

    params = SamplingParams(temperature=0.9, top_p=0.95, seed=5, max_tokens=24, ignore_eos=True)
    tokens = []
    for kernels in (PLATFORMS["cpu"].tree_kernels(), PORTABLE_KERNELS):
        record = replace(PLATFORMS["cpu"], tree_kernels=lambda kernels=kernels: kernels)
        monkeypatch.setitem(PLATFORMS, "cpu", record)
        with engine(WIDE) as llm:
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        tokens.append([list(o.outputs[0].token_ids) for o in outputs])
    assert tokens[0] == tokens[1]
