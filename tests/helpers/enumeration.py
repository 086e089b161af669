# SPDX-License-Identifier: Apache-2.0
"""Every draft of a node with its probability, from each rule's definition: no code under test."""

from dataclasses import dataclass

import numpy as np
import torch

from vllm_spechub.triton_kernels.verification.node_rules import draft_distribution


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


def normalised(weights) -> np.ndarray:
    weights = np.asarray(weights, dtype=np.float64)
    return weights / weights.sum()


def log(probs: np.ndarray) -> torch.Tensor:
    with np.errstate(divide="ignore"):
        return torch.from_numpy(np.log(probs))


def enumerate_drafts(
    q: np.ndarray, k: int, rule: str, greedy: bool = False, sharpening: float = 1.0
) -> Drafts:
    """`q` sums to 1, or is 0 throughout: a row that masks every token."""
    vocab_size = len(q)
    ranked = sorted(range(vocab_size), key=lambda token: (-q[token], token))
    greedy = greedy or not q.any()
    hubs, others = ranked[: k - 1], ranked[k - 1 :]
    w = np.zeros(vocab_size)
    if q[others].sum() > 0 and not greedy:
        w[others] = normalised(q[others] ** sharpening)
    else:
        w[others[0]] = 1.0
    if rule in ("rrs", "rrsw"):
        rows = [(1.0, ranked[:k], 0)] if greedy else draw_all(q, k, rule)
    else:
        rows = list(draw_spechub(q, k, rule, greedy, hubs, w))
    prob, children, sample_slot = zip(*(row for row in rows if row[0] > 0), strict=True)
    return Drafts(
        torch.tensor(prob, dtype=torch.float64),
        torch.tensor(children),
        torch.tensor(sample_slot),
        hubs,
        w,
    )


def draw_all(q: np.ndarray, k: int, rule: str):
    """(probability, children, 0) of every k draws from q, with or without replacement."""
    rows = [(1.0, [])]
    for _ in range(k):
        longer = []
        for prob, drawn in rows:
            left = q.copy()
            if rule == "rrsw":
                left[drawn] = 0.0
            if left.any():
                left = normalised(left)
            else:
                left[min(set(range(len(q))) - set(drawn))] = 1.0
            longer += [(prob * left[token], [*drawn, token]) for token in np.flatnonzero(left)]
        rows = longer
    return [(prob, drawn, 0) for prob, drawn in rows]


def draw_spechub(q: np.ndarray, k: int, rule: str, greedy: bool, hubs: list[int], w: np.ndarray):
    for x in np.flatnonzero(w).tolist():
        if rule in ("unordered", "chain") or k == 1:
            yield w[x], [*hubs, x], k - 1
            continue
        # Which child is the main one: a point mass on the first hub, or drawn from q.
        label = np.eye(len(q))[hubs[0]] if greedy else q
        yield w[x] * np.delete(label, hubs).sum(), [x, *hubs], 0
        for hub in hubs:
            rest = [other for other in hubs if other != hub]
            yield w[x] * label[hub], [hub, *rest, x], k - 1


def laws_of(q: np.ndarray, drafts: Drafts, rule: str, greedy=False, sharpening=1.0, dtype=None):
    """`draft_distribution` of every draft: what verification makes of the logits."""
    num_drafts, dtype = len(drafts.prob), dtype or torch.float64
    temperature = torch.full((num_drafts,), 0.0 if greedy else 1.0, dtype=dtype)
    logits = log(q).to(dtype).expand(num_drafts, -1)
    return draft_distribution(
        logits, temperature, drafts.children, drafts.sample_slot, rule=rule, sharpening=sharpening
    )


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


def random_laws(vocab_size: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A target and a draft, with zeros now and then; the draft may mask every token."""
    p, q = generator.dirichlet(np.full(vocab_size, generator.choice([0.2, 1, 5])), size=2)
    for law in (p, q):
        law[generator.random(vocab_size) < 0.2] = 0.0
    if not p.any():
        p[generator.integers(vocab_size)] = 1.0
    return normalised(p), normalised(q) if q.any() else q
