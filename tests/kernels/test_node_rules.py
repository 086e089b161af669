# SPDX-License-Identifier: Apache-2.0
"""`node_outcome` by exact enumeration: whatever is drafted, emitted tokens follow the target.

Every draft (sampled child, label) of a node is one row; its probability is computed here, apart
from the code under test.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from vllm_spechub.triton_kernels.verification.node_rules import draft_law, node_outcome

TOLERANCE = 1e-12


@dataclass
class Drafts:
    """All drafts of one node: one row each."""

    # [num_drafts]
    prob: torch.Tensor
    # [num_drafts, num_children]
    children: torch.Tensor
    # [num_drafts]
    sample_slot: torch.Tensor
    hubs: list[int]
    # [vocab_size]: law of the sampled child
    w: np.ndarray


def log(probs: np.ndarray) -> torch.Tensor:
    with np.errstate(divide="ignore"):
        return torch.from_numpy(np.log(probs))


def enumerate_drafts(q: np.ndarray, k: int, rule: str, greedy: bool = False) -> Drafts:
    vocab_size = len(q)
    ranked = sorted(range(vocab_size), key=lambda token: (-q[token], token))
    hubs, others = ranked[: k - 1], ranked[k - 1 :]
    if greedy:
        q = np.eye(vocab_size)[ranked[0]]
    off_hub_mass = sum(q[others])
    w = np.zeros(vocab_size)
    if off_hub_mass > 0:
        w[others] = q[others] / off_hub_mass
    else:
        w[others[0]] = 1.0

    rows = []
    for x in others:
        if rule == "unordered":
            rows.append((w[x], [*hubs, x], k - 1))
            continue
        # Without hubs the only label is the sampled child, whatever q's total.
        rows.append((w[x] * (off_hub_mass if hubs else 1.0), [x, *hubs], 0))
        for hub in hubs:
            rest = [other for other in hubs if other != hub]
            rows.append((w[x] * q[hub], [hub, *rest, x], k - 1))
    prob, children, sample_slot = zip(*(row for row in rows if row[0] > 0), strict=True)
    return Drafts(
        torch.tensor(prob, dtype=torch.float64),
        torch.tensor(children),
        torch.tensor(sample_slot),
        hubs,
        w,
    )


def outcomes(p, q, drafts, rule, greedy=False, dtype=torch.float64):
    num_drafts = len(drafts.prob)
    temperature = torch.full((num_drafts,), 0.0 if greedy else 1.0, dtype=dtype)
    logits = log(q).to(dtype).expand(num_drafts, -1)
    law = draft_law(logits, temperature, drafts.children, drafts.sample_slot, rule=rule)
    target = torch.from_numpy(p).to(dtype).expand(num_drafts, -1)
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


def check_node(p, q, k, rule, greedy=False):
    drafts = enumerate_drafts(q, k, rule, greedy)
    assert drafts.prob.sum().item() == pytest.approx(1.0, abs=TOLERANCE)
    outcome = outcomes(p, q, drafts, rule, greedy)
    assert (outcome.accept >= 0).all()
    assert (outcome.reject >= 0).all()
    total = outcome.accept.sum(dim=1) + outcome.reject
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=TOLERANCE)
    law, accepted = emitted(drafts, outcome, len(p))
    np.testing.assert_allclose(law, p, rtol=0, atol=TOLERANCE)
    off_hub = np.minimum(p, drafts.w)
    off_hub[drafts.hubs] = 0.0
    optimum = p[drafts.hubs].sum() + off_hub.sum()
    assert accepted == pytest.approx(optimum, abs=TOLERANCE)


def normalised(weights) -> np.ndarray:
    weights = np.asarray(weights, dtype=np.float64)
    return weights / weights.sum()


def special_laws(vocab_size: int) -> list[np.ndarray]:
    ramp = np.arange(1, vocab_size + 1)
    return [
        normalised(np.ones(vocab_size)),  # all tied
        normalised(ramp),
        normalised(ramp[::-1]),
        np.eye(vocab_size)[0],
        np.eye(vocab_size)[vocab_size - 1],
        normalised(ramp % 2),  # zeros
        normalised((ramp + 1) % 2),  # the other half: disjoint support
        normalised([1.0] * (vocab_size - 1) + [1e-9]),
        normalised([1e12, *[1.0] * (vocab_size - 1)]),  # confident
        normalised([2.0, 2.0, *[1.0] * (vocab_size - 2)]),  # tied hubs
    ]


CASES = [(vocab_size, k) for vocab_size in range(3, 7) for k in range(1, min(vocab_size, 4) + 1)]


@pytest.mark.parametrize("rule", ["unordered", "ordered"])
@pytest.mark.parametrize(("vocab_size", "k"), CASES)
def test_special_laws(vocab_size, k, rule):
    for p, q in itertools.product(special_laws(vocab_size), repeat=2):
        check_node(p, q, k, rule)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("rule", ["unordered", "ordered"])
@pytest.mark.parametrize(("vocab_size", "k"), CASES)
def test_random_laws(vocab_size, k, rule, greedy):
    generator = np.random.default_rng(vocab_size * 10 + k)
    for _ in range(25):
        p, q = generator.dirichlet(np.full(vocab_size, generator.choice([0.2, 1, 5])), size=2)
        for law in (p, q):
            law[generator.random(vocab_size) < 0.2] = 0.0
        if p.sum() > 0 and q.sum() > 0:
            check_node(normalised(p), normalised(q), k, rule, greedy)


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


@pytest.mark.parametrize("rule", ["unordered", "ordered"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_float32_has_no_nan_and_no_impossible_outcome(k, rule):
    """Target equal to the draft, confident drafts, vanishing tails: weights stay usable."""
    vocab_size = 6
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


@dataclass
class Node:
    """A node of a small tree: its children by slot."""

    children: tuple["Node", ...] = ()


LEAF = Node()
TREES = {
    "equal": Node((Node((LEAF, LEAF)), Node((LEAF, LEAF)))),
    "deep first slot": Node((Node((LEAF, LEAF, LEAF)), LEAF)),
    "deep last slot": Node((LEAF, LEAF, Node((LEAF,)))),
    "chain": Node((Node((LEAF,)),)),
    "truncated": Node((LEAF, Node((LEAF, LEAF)))),
    "root only": LEAF,
}


@pytest.mark.parametrize("rule", ["unordered", "ordered"])
@pytest.mark.parametrize("name", TREES)
def test_whole_tree(name, rule):
    """Prefixes of three tokens, when the laws differ at every node."""
    vocab_size, length = 3, 3
    generator = np.random.default_rng(7)
    contexts = [c for n in range(length) for c in itertools.product(range(vocab_size), repeat=n)]
    target = dict(zip(contexts, generator.dirichlet(np.ones(vocab_size), 13), strict=True))
    draft = dict(zip(contexts, generator.dirichlet(np.ones(vocab_size), 13), strict=True))

    def plain(context: tuple[int, ...], prob: float, result: dict) -> None:
        if len(context) == length:
            result[context] = result.get(context, 0.0) + prob
            return
        for token in range(vocab_size):
            plain((*context, token), prob * target[context][token], result)

    def walk(node: Node, context: tuple[int, ...], prob: float, result: dict) -> None:
        if not node.children:
            plain(context, prob, result)
            return
        p, q = target[context], draft[context]
        drafts = enumerate_drafts(q, len(node.children), rule)
        outcome = outcomes(p, q, drafts, rule)
        for row, draft_prob in enumerate(drafts.prob.tolist()):
            for slot, child in enumerate(node.children):
                token = drafts.children[row, slot].item()
                weight = draft_prob * outcome.accept[row, slot].item()
                walk(child, (*context, token), prob * weight, result)
            if outcome.reject[row] > 0:
                residual = outcome.residual[row] / outcome.residual[row].sum()
                for token, weight in enumerate((outcome.reject[row] * residual).tolist()):
                    plain((*context, token), prob * draft_prob * weight, result)

    actual: dict = {}
    walk(TREES[name], (), 1.0, actual)
    expected: dict = {}
    plain((), 1.0, expected)
    assert actual.keys() == expected.keys()
    for context, prob in expected.items():
        assert actual[context] == pytest.approx(prob, abs=TOLERANCE)
