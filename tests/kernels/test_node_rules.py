# SPDX-License-Identifier: Apache-2.0
"""`node_outcome` by exact enumeration: whatever is drafted, emitted tokens follow the target.

Every draft (sampled child, label) of a node is one row; its probability is computed here, apart
from the code under test.
"""

import itertools

import numpy as np
import pytest
import torch

from helpers.enumeration import (
    Drafts,
    enumerate_drafts,
    laws_of,
    normalised,
    random_laws,
    special_laws,
)
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES
from vllm_spechub.triton_kernels.verification.node_rules import node_outcome

RECURSIVE = tuple(name for name, rule in BUILTIN_RULES.items() if rule.is_recursive)
RULES = tuple(BUILTIN_RULES)
SPECHUB = tuple(name for name, rule in BUILTIN_RULES.items() if rule.sharpens)

TOLERANCE = 1e-12


def outcomes(p, q, drafts, rule, greedy=False, sharpening=1.0, dtype=torch.float64):
    law = laws_of(q, drafts, rule, greedy, sharpening, dtype)
    target = torch.from_numpy(p).to(dtype).expand(len(drafts.prob), -1)
    return node_outcome(target, law, drafts.children, drafts.sample_slot, rule=rule)


def emitted(drafts: Drafts, outcome, vocab_size: int) -> tuple[np.ndarray, float]:
    """The distribution of the token emitted at the node, and the probability of acceptance."""
    law = torch.zeros(vocab_size, dtype=torch.float64)
    accepted = drafts.prob.unsqueeze(1) * outcome.accept
    law.scatter_add_(0, drafts.children.flatten(), accepted.flatten())
    mass = outcome.residual.sum(dim=1)
    rejected = drafts.prob * outcome.reject / mass.masked_fill(mass == 0, 1.0)
    law += (rejected.unsqueeze(1) * outcome.residual).sum(dim=0)
    return law.numpy(), accepted.sum().item()


def check_node(p, q, k, rule, greedy=False, sharpening=1.0):
    drafts = enumerate_drafts(q, k, rule, greedy, sharpening)
    assert drafts.prob.sum().item() == pytest.approx(1.0, abs=TOLERANCE)
    outcome = outcomes(p, q, drafts, rule, greedy, sharpening)
    assert (outcome.accept >= 0).all()
    assert (outcome.reject >= 0).all()
    total = outcome.accept.sum(dim=1) + outcome.reject
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=TOLERANCE)
    law, accepted = emitted(drafts, outcome, len(p))
    np.testing.assert_allclose(law, p, rtol=0, atol=TOLERANCE)
    if rule in RECURSIVE and k > 1:
        return
    off_hub = np.minimum(p, drafts.w)
    off_hub[drafts.hubs] = 0.0
    optimum = p[drafts.hubs].sum() + off_hub.sum()
    assert accepted == pytest.approx(optimum, abs=TOLERANCE)


CASES = [
    (vocab_size, k, rule)
    for rule in RULES
    for vocab_size in range(3, 6 if rule in RECURSIVE else 7)
    for k in range(1, (1 if rule == "chain" else min(vocab_size, 4)) + 1)
]


@pytest.mark.parametrize(("vocab_size", "k", "rule"), CASES)
def test_special_laws(vocab_size, k, rule):
    laws = special_laws(vocab_size)
    for p, q in itertools.product(laws, [*laws, np.zeros(vocab_size)]):
        check_node(p, q, k, rule)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize(("vocab_size", "k", "rule"), CASES)
def test_random_laws(vocab_size, k, rule, greedy):
    generator = np.random.default_rng(vocab_size * 10 + k)
    for _ in range(25):
        check_node(*random_laws(vocab_size, generator), k, rule, greedy)


@pytest.mark.parametrize("sharpening", [0.3, 2.5])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("rule", SPECHUB)
def test_sharpened(rule, k, sharpening):
    generator = np.random.default_rng(k)
    for _ in range(25):
        check_node(*random_laws(5, generator), k, rule, sharpening=sharpening)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_ordered_first_slot(k):
    """Slot 0 is accepted with sum off H of min(p, q) + sum over H of min(p, l)."""
    generator = np.random.default_rng(k)
    for _ in range(50):
        p, q = generator.dirichlet(np.ones(6), size=2)
        drafts = enumerate_drafts(q, k, rule="ordered")
        outcome = outcomes(p, q, drafts, rule="ordered")
        first = (drafts.prob * outcome.accept[:, 0]).sum().item()
        hub_mass = q[drafts.hubs].sum()
        off_hub = np.ones(6, dtype=bool)
        off_hub[drafts.hubs] = False
        claimed = np.maximum(p - q, 0)
        unclaimed = np.maximum(hub_mass * drafts.w - claimed, 0)[off_hub].sum()
        share = unclaimed * q[drafts.hubs] / hub_mass
        expected = np.minimum(p, q)[off_hub].sum() + np.minimum(p[drafts.hubs], share).sum()
        assert first == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("rule", "k"), [(rule, k) for rule in RULES for k in range(1, 2 if rule == "chain" else 5)]
)
def test_float32_has_no_nan_and_no_impossible_outcome(rule, k):
    """Target equal to the draft, confident drafts, vanishing tails: weights stay usable."""
    vocab_size = 5
    laws = special_laws(vocab_size)
    laws += [normalised(np.exp(-s * np.arange(vocab_size))) for s in (1.0, 10.0, 40.0, 150.0)]
    for p, q in itertools.product(laws, repeat=2):
        drafts = enumerate_drafts(q, k, rule)
        outcome = outcomes(p, q, drafts, rule, dtype=torch.float32)
        weights = torch.cat([outcome.accept, outcome.reject.unsqueeze(1)], dim=1)
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(weights)), rtol=0, atol=1e-6)
        target = torch.from_numpy(p).to(torch.float32)
        assert (outcome.accept[target[drafts.children] == 0] == 0).all()
        assert (outcome.residual[outcome.reject > 0].sum(dim=1) > 0).all()
        assert (outcome.residual[:, target == 0] == 0).all()
        law, _ = emitted(drafts, outcome, vocab_size)
        np.testing.assert_allclose(law, p, rtol=0, atol=2e-6)
