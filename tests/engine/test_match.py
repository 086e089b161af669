# SPDX-License-Identifier: Apache-2.0
"""`match`: a seed's text is the one that plain decoding gives, whatever is drafted beside what."""

from dataclasses import dataclass, field

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from helpers.engines import engine, plain_engine, token_ids
from helpers.metrics import spec_metrics, spechub_metrics
from helpers.pair import NESTED, PROMPTS, TARGET
from helpers.schedules import SCHEDULE
from vllm_spechub.engine.sampler import TreeRejectionSampler

WIDE = [0, 0, 0, 0, 1, 1, 2, 5]


def sampled(seed: int, max_tokens: int, **options) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=max_tokens, **{"ignore_eos": True} | options)


# They end one after the other, so that a schedule changes its tree.
REQUESTS = [
    sampled(1, 12, temperature=1.0),
    sampled(2, 18, temperature=0.7),
    sampled(3, 24, temperature=1.0, top_k=12),
    sampled(4, 30, temperature=0.7, top_p=0.85, repetition_penalty=1.3, frequency_penalty=0.4),
    sampled(5, 36, temperature=1.0, min_p=0.03, logit_bias={289: 2.0}),
    sampled(6, 44, temperature=1.0, top_k=40, top_p=0.95, presence_penalty=0.5),
    sampled(7, 40, temperature=0.7, bad_words=[" self"], min_tokens=20, ignore_eos=False),
    sampled(
        8, 20, temperature=1.0, structured_outputs=StructuredOutputsParams(regex=r"[a-z_]{4,60}")
    ),
]
TEXTS = [*PROMPTS, PROMPTS[0], PROMPTS[2]]


def ask(llm) -> list[list[int]]:
    return token_ids(llm.generate(TEXTS, REQUESTS, use_tqdm=False))


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    """What decoding without speculation answers."""
    with plain_engine() as llm:
        answers = ask(llm)
        assert ask(llm) == answers
    return answers


@dataclass
class Steps:
    """What the engines of a test verified."""

    # how many drafted nodes each request brought into a step
    drafted: list[int] = field(default_factory=list)


@pytest.fixture
def steps(monkeypatch) -> Steps:
    seen, original = Steps(), TreeRejectionSampler.__call__

    def spy(self, logits, batch, *args, **kwargs):
        seen.drafted += batch.num_draft_tokens_per_req.tolist()
        return original(self, logits, batch, *args, **kwargs)

    monkeypatch.setattr(TreeRejectionSampler, "__call__", spy)
    return seen


def match(tree, **options):
    return engine(tree, verification="match", **options)


@pytest.mark.parametrize("tree", ["binary:3", WIDE, "chain:3"])
def test_static_trees(tree, plain):
    with match(tree) as llm:
        assert ask(llm) == plain
        metrics = spec_metrics(llm)
    assert metrics["num_accepted_tokens"] > 0.5 * metrics["num_drafts"]


@pytest.mark.parametrize(
    ("draft", "spec"),
    [
        pytest.param(TARGET, {}, id="the target"),
        pytest.param(None, {"proposer": "early_exit", "exit_layer": 1}, id="its first layer"),
        pytest.param(NESTED, {"draft_layers": 6}, id="first layers of a draft"),
    ],
)
def test_whatever_the_draft_is(plain, draft, spec):
    """It guesses otherwise, and the text stays."""
    with match("kary:3:2", draft=draft, spec=spec, async_scheduling=True) as llm:
        assert ask(llm) == plain


@pytest.mark.parametrize("asynchronous", [False, True])
def test_while_the_tree_follows_the_load(asynchronous, plain, steps):
    with match(SCHEDULE, async_scheduling=asynchronous) as llm:
        assert ask(llm) == plain
        ours = spechub_metrics(llm)
    assert {2, 14} <= set(steps.drafted)
    assert all(ours["steps"][width] > 3 for width in ("2", "14"))
    assert ours["fallback_steps"]["load"] > 5


@pytest.mark.parametrize("asynchronous", [False, True])
def test_beside_others_under_a_schedule(asynchronous, plain):
    """The same request, alone and beside unseeded neighbours that leave one after the other."""
    with match(SCHEDULE, async_scheduling=asynchronous) as llm:
        for others in (0, 1, 3, 6):
            beside = [
                SamplingParams(temperature=0.9, max_tokens=6 + 5 * i, ignore_eos=True)
                for i in range(others)
            ]
            for i in (0, 3):
                prompts = [TEXTS[i], *["x"] * others]
                outputs = llm.generate(prompts, [REQUESTS[i], *beside], use_tqdm=False)
                assert token_ids(outputs)[0] == plain[i], others


@pytest.mark.parametrize(("budget", "asynchronous"), [(24, False), (24, True), (41, True)])
def test_tight_budgets(budget, asynchronous, plain, steps):
    options = {"max_num_batched_tokens": budget, "async_scheduling": asynchronous}
    with match("binary:3", **options) as llm:
        assert ask(llm) == plain
    truncated = [count for count in steps.drafted if 0 < count < 14]
    assert len(truncated) > 5


@pytest.mark.parametrize("asynchronous", [False, True])
def test_preemption_under_a_schedule(asynchronous, plain, steps):
    schedule = [[1, 2, "chain:2"], [3, None, "binary:3"]]
    options = {"block_size": 32, "num_gpu_blocks_override": 12, "async_scheduling": asynchronous}
    with match(schedule, **options) as llm:
        assert ask(llm) == plain
        preemptions = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    assert {2, 14} <= set(steps.drafted)
    assert preemptions[0] > 0
