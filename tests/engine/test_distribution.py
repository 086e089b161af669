# SPDX-License-Identifier: Apache-2.0
"""Above temperature 0 the emitted prefixes have exactly the target's distribution."""

from collections import Counter

import pytest
import torch
from conftest import PROMPTS, TARGET, engine, reference_model, spec_metrics
from scipy.stats import chisquare
from transformers import AutoTokenizer
from vllm import SamplingParams

SAMPLES = 3000
LENGTHS = (2, 3, 4)  # the first token comes from the prompt's step, the others from trees
FLOOR = 10 / SAMPLES


def next_token(prefixes: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The target's exact distribution after each prefix. [num_prefixes, vocab_size]"""
    logits = reference_model()(input_ids=prefixes).logits[:, -1].double() / params.temperature
    if params.top_k > 0:
        logits[logits < logits.topk(params.top_k).values[:, -1:]] = -torch.inf
    probs = logits.softmax(-1)
    if params.top_p < 1:
        ranked, order = probs.sort(descending=True)
        beyond = ranked.cumsum(-1) - ranked >= params.top_p
        probs[torch.zeros_like(beyond).scatter(1, order, beyond)] = 0
        probs /= probs.sum(-1, keepdim=True)
    return probs


def likely_prefixes(
    prompt: list[int], params: SamplingParams, length: int, law=next_token
) -> dict[tuple[int, ...], float]:
    """Every prefix of that many tokens whose probability is above FLOOR."""
    prefixes = {(): 1.0}
    for _ in range(length):
        rows = torch.tensor([[*prompt, *prefix] for prefix in prefixes])
        probs = law(rows, params)
        longer = {}
        for (prefix, mass), row in zip(prefixes.items(), probs, strict=True):
            joint = row * mass
            for token in torch.nonzero(joint > FLOOR).flatten().tolist():
                longer[(*prefix, token)] = joint[token].item()
        prefixes = longer
    return prefixes


def assert_prefixes_follow(
    output, prompt: list[int], params: SamplingParams, law=next_token
) -> None:
    """Chi-square of the emitted prefixes of every length against the target's own law."""
    for length in LENGTHS:
        expected = likely_prefixes(prompt, params, length, law)
        counts = Counter(tuple(sample.token_ids[:length]) for sample in output.outputs)
        observed = [counts[prefix] for prefix in expected]
        wanted = [mass * SAMPLES for mass in expected.values()]
        observed.append(SAMPLES - sum(observed))  # every other prefix, in one bin
        wanted.append(max(SAMPLES - sum(wanted), 1e-9))
        if wanted[-1] < 5:
            observed[-2:], wanted[-2:] = [sum(observed[-2:])], [sum(wanted[-2:])]
        assert len(wanted) >= 5
        p_value = chisquare(observed, wanted).pvalue
        assert p_value > 1e-4, f"p = {p_value:.2e} over {len(wanted)} prefixes of {length} tokens"


@pytest.mark.parametrize(
    ("tree", "verification", "params"),
    [
        ("binary:3", "ordered", {"temperature": 1.0}),
        ("binary:3", "unordered", {"temperature": 0.7}),
        ("kary:3:2", "ordered", {"temperature": 0.6, "top_k": 20, "top_p": 0.9}),
        ([0, 0, 0, 0, 1, 1, 2, 5], "unordered", {"temperature": 0.8, "top_k": 5}),
        ([0, 0, 0, 0, 1, 1, 2, 5], "ordered", {"temperature": 0.8, "top_p": 0.8}),
        ("chain:3", "ordered", {"temperature": 0.7, "min_p": 0.0}),
    ],
)
def test_prefixes_follow_the_target(tree, verification, params):
    prompt = AutoTokenizer.from_pretrained(TARGET)(PROMPTS[4])["input_ids"]
    params = SamplingParams(n=SAMPLES, max_tokens=LENGTHS[-1], ignore_eos=True, **params)
    options = {"max_num_seqs": 128, "max_num_batched_tokens": 4096}
    with engine(tree, verification=verification, **options) as llm:
        output = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0]
        metrics = spec_metrics(llm)
    assert metrics["num_accepted_tokens"] > 0.3 * SAMPLES

    assert_prefixes_follow(output, prompt, params)


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
    from vllm_spechub.rules import spechub
    from vllm_spechub.triton_kernels.child_sampling import sample_children
    from vllm_spechub.triton_kernels.verification import verify_tree

    params = SamplingParams(temperature=0.9, top_p=0.95, seed=5, max_tokens=24, ignore_eos=True)
    tokens = []
    for calls in ({}, {"sample_children": sample_children, "verify_tree": verify_tree}):
        for name, function in calls.items():
            monkeypatch.setattr(spechub, name, function)
        with engine([0, 0, 0, 0, 1, 1, 2, 5]) as llm:
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        tokens.append([list(o.outputs[0].token_ids) for o in outputs])
    assert tokens[0] == tokens[1]
