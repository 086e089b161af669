# SPDX-License-Identifier: Apache-2.0
"""Whole trees by exact enumeration: everything that is emitted has the target's distribution.

Every draft, every outcome and every emitted token of a small tree is followed with its probability.
A walk that ends early is continued with the target, so that sequences of one length compare.
"""

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from helpers.enumeration import enumerate_drafts, laws_of, random_laws, special_laws
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES
from vllm_spechub.triton_kernels.verification.node_rules import node_outcome, traversal_outcome

RULES = tuple(BUILTIN_RULES)
SPECHUB = tuple(name for name, rule in BUILTIN_RULES.items() if rule.sharpens)

TOLERANCE = 1e-12

# A tree is the tuple of its root's subtrees by slot. A truncated one is just a smaller one.
LEAF = ()
TREES = {
    "equal": ((LEAF, LEAF), (LEAF, LEAF)),
    "deep first slot": (((LEAF, LEAF), LEAF), LEAF),
    "deep last slot": (LEAF, LEAF, ((LEAF,),)),
    "chain": (((LEAF,),),),
    "three": ((LEAF,), LEAF, (LEAF, LEAF)),
    "root only": LEAF,
}
SEQUENCE_LENGTH = 4

Law = dict[tuple[int, ...], float]


def size(tree) -> int:
    return 1 + sum(map(size, tree))


@dataclass
class Model:
    """A target and a draft whose laws differ in every context, and some of them are special."""

    vocab_size: int
    seed: int
    # how often a law is a special one: target, draft
    special: tuple[float, float] = (0.15, 0.3)
    # [vocab_size] by context
    target: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict)
    draft: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        generator = np.random.default_rng(self.seed)
        special = special_laws(self.vocab_size)
        for length in range(SEQUENCE_LENGTH):
            for context in itertools.product(range(self.vocab_size), repeat=length):
                p, q = random_laws(self.vocab_size, generator)
                if generator.random() < self.special[0]:
                    p = special[generator.integers(len(special))]
                if generator.random() < self.special[1]:
                    q = special[generator.integers(len(special))]
                self.target[context], self.draft[context] = p, q

    def sequences(self, emitted: Law) -> Law:
        """Emitted sequences continued with the target to SEQUENCE_LENGTH tokens."""
        result: Law = {}
        for context, mass in emitted.items():
            for rest in itertools.product(
                range(self.vocab_size), repeat=SEQUENCE_LENGTH - len(context)
            ):
                prob, sequence = mass, context
                for token in rest:
                    prob *= self.target[sequence][token]
                    sequence = (*sequence, token)
                result[sequence] = result.get(sequence, 0.0) + prob
        return result


@dataclass
class Walk:
    """What one rule emits below any context of one tree."""

    model: Model
    rule: str
    sharpening: float = 1.0

    def drafts(self, context: tuple[int, ...], tree):
        """(probability, children, sample slot, a function to an outcome) of every draft."""
        q = self.model.draft[context]
        drafts = enumerate_drafts(q, len(tree), self.rule, sharpening=self.sharpening)
        law = laws_of(q, drafts, self.rule, sharpening=self.sharpening)
        target = torch.from_numpy(self.model.target[context]).expand(len(drafts.prob), -1)
        return drafts, law, target

    def emit(self, context: tuple[int, ...], law, prob: float, result: Law) -> None:
        if prob > 0:
            for token in np.flatnonzero(law).tolist():
                sequence = (*context, token)
                result[sequence] = result.get(sequence, 0.0) + prob * law[token] / law.sum()

    def down(self, tree, context: tuple[int, ...] = (), prob: float = 1.0) -> Law:
        """Top-down: one node after the other."""
        result: Law = {}
        if not tree:
            self.emit(context, self.model.target[context], prob, result)
            return result
        drafts, law, target = self.drafts(context, tree)
        outcome = node_outcome(target, law, drafts.children, drafts.sample_slot, rule=self.rule)
        for row, draft_prob in enumerate((prob * drafts.prob).tolist()):
            rejected = draft_prob * outcome.reject[row].item()
            self.emit(context, outcome.residual[row].numpy(), rejected, result)
            for slot, subtree in enumerate(tree):
                accepted = draft_prob * outcome.accept[row, slot].item()
                if accepted > 0:
                    child = (*context, drafts.children[row, slot].item())
                    for sequence, mass in self.down(subtree, child, accepted).items():
                        result[sequence] = result.get(sequence, 0.0) + mass
        return result

    def up(self, tree, ordered=None, context=(), acceptance=1.0, prob=1.0) -> tuple[Law, float]:
        """Leaf to root, one subtree visited with a path acceptance: what it emits, and the
        probability that it fails. `ordered` as `verify_tree` has it, or forced."""
        result: Law = {}
        if not tree:
            self.emit(context, self.model.target[context], prob * acceptance, result)
            return result, prob * (1.0 - acceptance)
        drafts, law, target = self.drafts(context, tree)
        outcome = traversal_outcome(
            target,
            law,
            drafts.children,
            drafts.sample_slot,
            torch.full_like(drafts.prob, acceptance),
            ordered=len(set(map(size, tree))) > 1 if ordered is None else ordered,
        )
        failed = 0.0
        for row, reach in enumerate((prob * drafts.prob).tolist()):
            sample = drafts.sample_slot[row].item()
            for slot in sorted(range(len(tree)), key=lambda slot: (slot != sample, slot)):
                visit = outcome.visit[row, slot].item()
                assert 0.0 <= visit <= 1.0
                if visit == 0.0:
                    continue
                child = (*context, drafts.children[row, slot].item())
                emitted, left = self.up(tree[slot], ordered, child, visit, reach)
                # a subtree is accepted with exactly the probability it is visited with
                assert left == pytest.approx(reach * (1.0 - visit), abs=TOLERANCE)
                reach = left
                for sequence, mass in emitted.items():
                    result[sequence] = result.get(sequence, 0.0) + mass
            leave = outcome.leave[row].item()
            self.emit(context, outcome.residual[row].numpy(), reach * leave, result)
            failed += reach * (1.0 - leave)
        return result, failed


def assert_lossless(model: Model, emitted: Law) -> None:
    actual, expected = model.sequences(emitted), model.sequences({(): 1.0})
    for sequence in actual.keys() | expected.keys():
        assert actual.get(sequence, 0.0) == pytest.approx(
            expected.get(sequence, 0.0), abs=TOLERANCE
        )


def expected_length(emitted: Law) -> float:
    return sum(len(sequence) * mass for sequence, mass in emitted.items())


TOP_DOWN = [(rule, name) for rule in RULES[:-1] if rule != "traversal" for name in TREES]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rule", "name"), [*TOP_DOWN, ("chain", "chain")])
def test_top_down(rule, name, seed):
    model = Model(3, seed)
    assert_lossless(model, Walk(model, rule).down(TREES[name]))


@pytest.mark.parametrize("rule", SPECHUB)
@pytest.mark.parametrize("tree", [(LEAF, (LEAF,), LEAF, LEAF), ((LEAF, LEAF, LEAF, LEAF), LEAF)])
def test_four_children(rule, tree):
    for vocab_size in (4, 5):
        model = Model(vocab_size, 7)
        walk = Walk(model, rule)
        assert_lossless(model, walk.up(tree)[0] if rule == "traversal" else walk.down(tree))


@pytest.mark.parametrize("rule", ["rrs", "rrsw"])
def test_four_drawn_children(rule):
    model = Model(4, 7)
    assert_lossless(model, Walk(model, rule).down((LEAF, (LEAF,), LEAF, LEAF)))


@pytest.mark.parametrize("sharpening", [0.4, 2.5])
@pytest.mark.parametrize("name", ["equal", "deep first slot", "three"])
@pytest.mark.parametrize("rule", SPECHUB)
def test_sharpened(rule, name, sharpening):
    model = Model(3, 11)
    walk, tree = Walk(model, rule, sharpening), TREES[name]
    assert_lossless(model, walk.up(tree)[0] if rule == "traversal" else walk.down(tree))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TREES)
def test_traversal(name, seed):
    """Lossless either way a node may emit its masses, and never shorter than top-down."""
    model, tree = Model(3, seed), TREES[name]
    walk = Walk(model, "traversal")
    lengths = {}
    for ordered in (None, True, False):
        emitted, failed = walk.up(tree, ordered)
        assert failed == pytest.approx(0.0, abs=TOLERANCE)
        assert_lossless(model, emitted)
        lengths[ordered] = expected_length(emitted)
    for ordered in (None, True):
        top_down = expected_length(Walk(model, "ordered").down(tree))
        assert lengths[ordered] >= top_down - TOLERANCE


@pytest.mark.parametrize(("name", "longer"), [("equal", False), ("deep first slot", True)])
def test_traversal_gains(name, longer):
    """Traversal is longer than top-down, and `verify_tree`'s way of emitting the longer of both."""
    tree, lengths, top_down = TREES[name], {True: 0.0, False: 0.0}, 0.0
    for seed in range(6):
        model = Model(5, seed, special=(0.0, 0.0))
        top_down += expected_length(Walk(model, "ordered").down(tree))
        for ordered in lengths:
            lengths[ordered] += expected_length(Walk(model, "traversal").up(tree, ordered)[0])
    assert lengths[longer] > lengths[not longer] + 0.01
    assert lengths[longer] > top_down + 0.01
