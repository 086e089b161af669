# SPDX-License-Identifier: Apache-2.0
"""Whole trees in exact arithmetic: what a step emits has the target's distribution, exactly.

Every draft, every outcome and every emitted token of a small tree is followed with its probability,
a fraction. Every node on the way is compared with the code.
"""

from fractions import Fraction

import pytest
import torch

from helpers.enumeration import (
    DRAFTING,
    FIXED_HUBS,
    Case,
    Child,
    Context,
    Grown,
    Model,
    Plan,
    Walk,
    best_of,
    expected_length,
    grow,
    level_counts,
    normalised,
    sequences,
    total_variation,
    verify,
    visiting_order,
)
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES
from vllm_spechub.triton_kernels.verification.node import node_outcome

F = Fraction
ALL = DRAFTING | FIXED_HUBS
SHARPENED = [name for name, drafting in ALL.items() if drafting.sharpens]

LEAF = ()
TREES = {
    "equal": ((LEAF, LEAF), (LEAF, LEAF)),
    "deep first slot": (((LEAF, LEAF), LEAF), LEAF),
    "deep last slot": (LEAF, LEAF, ((LEAF,),)),
    "chain": (((LEAF,),),),
    "three": ((LEAF,), LEAF, (LEAF, LEAF)),
    "root only": LEAF,
}
"""By slot. A truncated tree is just a smaller one."""
FOUR = {"four": (LEAF, (LEAF,), LEAF, LEAF), "four below": ((LEAF, LEAF, LEAF, LEAF), LEAF)}
CASES = [
    (rule, name)
    for rule in ALL
    for name in TREES
    if rule != "chain" or name in ("chain", "root only")
]


def depth(tree) -> int:
    return 1 + max(map(depth, tree)) if tree else 0


def assert_code_agrees(cases: list[Case]) -> None:
    """`node.node_outcome`, in float64, against the vectors, wherever verification may come."""

    def doubles(values) -> torch.Tensor:
        return torch.tensor([[*map(float, row)] for row in values], dtype=torch.float64)

    for replaces in (False, True):
        chosen = [case for case in cases if case.replaces == replaces]
        if not chosen:
            continue
        width = max(len(case.children) for case in chosen)
        children = torch.full((len(chosen), width), -1)
        sampled = torch.zeros(len(chosen), width, dtype=torch.bool)
        visit, seen = torch.zeros(len(chosen), width).double(), sampled.clone()
        left = torch.zeros(len(chosen), dtype=torch.bool)
        for row, case in enumerate(chosen):
            reached = True
            for slot in visiting_order(case.children):
                children[row, slot], sampled[row, slot] = case.children[slot]
                visit[row, slot] = float(case.outcome.visit[slot])
                seen[row, slot] = reached
                reached &= case.outcome.visit[slot] < 1
            left[row] = reached
        acceptance = doubles([[case.acceptance] for case in chosen]).squeeze(1)
        found = node_outcome(
            doubles(case.p for case in chosen),
            doubles(case.weights for case in chosen).log(),
            children,
            sampled,
            acceptance,
            replaced=replaces,
        )
        torch.testing.assert_close(found.visit[seen], visit[seen], rtol=0, atol=1e-12)
        owed = doubles(case.outcome.owed for case in chosen)[left]
        leave, residual = owed.sum(dim=1), found.residual[left]
        torch.testing.assert_close(found.leave[left], leave, rtol=0, atol=1e-12)
        residual = residual * (leave / residual.sum(dim=1)).unsqueeze(1)
        torch.testing.assert_close(residual, owed, rtol=0, atol=1e-12)


def test_rules_are_those_of_the_table():
    """The model here has every rule, drafted and verified as its row says."""
    assert set(DRAFTING) == set(BUILTIN_RULES)
    for name, drafting in DRAFTING.items():
        rule = BUILTIN_RULES[name]
        assert drafting.replaces == rule.replaces
        assert drafting.by_expectation == rule.ranks_subtrees
        assert drafting.leaf_to_root == rule.is_leaf_to_root
        assert drafting.sharpens == rule.sharpens


def check(rule: str, tree, model: Model, power: int = 1) -> None:
    """Lossless in both directions, and the code has what the vectors have."""
    lengths = []
    for leaf_to_root in (False, True):
        walk = Walk(model, ALL[rule].towards(leaf_to_root), power)
        emitted = walk.step(tree)
        assert sum(emitted.values()) == 1
        assert total_variation(model, emitted, depth(tree) + 1) == 0
        lengths.append(expected_length(emitted))
        assert_code_agrees(walk.cases)
    assert lengths[1] >= lengths[0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("rule", "name"), CASES)
def test_lossless(rule, name, seed):
    check(rule, TREES[name], Model(3, seed))


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("rule", [rule for rule in ALL if rule != "chain"])
def test_four_children(rule, name):
    check(rule, FOUR[name], Model(4, 7))


@pytest.mark.parametrize("name", ["equal", "deep first slot", "three"])
@pytest.mark.parametrize("rule", SHARPENED)
def test_sharpened(rule, name):
    for seed in (11, 12):
        check(rule, TREES[name], Model(3, seed), power=2)


@pytest.mark.parametrize("rule", ["traversal", "mixed"])
def test_leaf_to_root_is_longer(rule):
    """Not only never shorter."""
    for name in ("equal", "deep first slot"):
        gain = F(0)
        for seed in range(4):
            model = Model(3, seed, special=0.0)
            lengths = [
                expected_length(Walk(model, ALL[rule].towards(up)).step(TREES[name]))
                for up in (False, True)
            ]
            gain += lengths[1] - lengths[0]
        assert gain / 4 > F(1, 1000)


def test_the_subtree_matters():
    """Which child has the larger subtree changes the length, so slots are worth choosing."""
    tree, lengths = (((LEAF, LEAF), LEAF), LEAF), {}
    for rule in ("ordered", "unordered"):
        walks = [Walk(Model(3, seed, special=0.0), ALL[rule]) for seed in range(6)]
        lengths[rule] = sum(expected_length(walk.step(tree)) for walk in walks)
    assert lengths["ordered"] != lengths["unordered"]


# Trees whose shape varies with the draft: what may be looked at, and what may not.


def expand_best(model: Model, width: int):
    """The best nodes of a level get a sample and a hub each."""

    def plan(tree: Grown, level: list[Context]) -> Plan:
        return dict.fromkeys(best_of(tree.scores, level, width), (1, 1))

    return plan


def reranked(grown: list[tuple[Fraction, Grown]], keep: int) -> list[tuple[Fraction, Grown]]:
    """The best nodes of every tree, chosen when all of it is drawn (EAGLE-2)."""
    result = []
    for prob, tree in grown:
        kept = set(best_of(tree.scores, list(tree.scores), keep))
        children = {
            context: tuple(child for child in below if (*context, child.token) in kept)
            for context, below in tree.children.items()
            if context in kept or not context
        }
        result.append((prob, tree._replace(children=children)))
    return result


def level_widths(model: Model, rule: str, widths: tuple[int, ...]):
    """So many nodes a level, decided before any of them is drawn, and all kept."""

    def plan(tree: Grown, level: list[Context]) -> Plan:
        drafting, rows = ALL[rule], [model.draft(context) for context in level]
        reach = [tree.scores.get(context, F(1)) for context in level]
        width = widths[len(level[0])]
        most = min(4, model.vocab_size)
        counts = level_counts(rows, reach, width, drafting, most)
        # a child is a sample only if something can be drawn
        hubs = [drafting.hubs(q, k) if any(q) else k for q, k in zip(rows, counts, strict=True)]
        return {context: (k - m, m) for context, k, m in zip(level, counts, hubs, strict=True) if k}

    return plan


def targeted(context: Context) -> tuple[Fraction, ...]:
    """A draft for which what is drawn below a hub decides whether the hub's sibling is kept."""
    if context == ():
        return normalised([8, 1, 1])
    if context == (0,):
        return normalised([34, 33, 33])
    return normalised([90, 5, 5] if context == (0, 1) else [34, 33, 33])


def variations(make, leaf_to_root: bool, given=targeted) -> list[Fraction]:
    result = []
    for seed in range(2):
        model = Model(3, seed, special=0.0, given=given)
        for size in (2, 3, 4):
            result.append(total_variation(model, verify(model, make(model, size), leaf_to_root), 4))
    return result


def rerank(model: Model, keep: int, looks_at_tokens: bool = False):
    return reranked(grow(model, 3, expand_best(model, 2), looks_at_tokens), keep)


def test_rerank_by_draft_is_lossless_from_the_root_only():
    assert max(variations(rerank, leaf_to_root=False)) == 0
    assert max(variations(rerank, leaf_to_root=True)) > F(1, 1000)


@pytest.mark.parametrize("leaf_to_root", [False, True])
def test_nodes_must_not_be_chosen_by_their_tokens(leaf_to_root):
    def make(model: Model, keep: int):
        return rerank(model, keep, looks_at_tokens=True)

    # random drafts show it from the root, too
    assert max(variations(make, leaf_to_root, given=None)) > F(1, 1000)


LEVELS = {
    rule: [(2, 3), (3, 2), (2, 3, 2), (1, 3, 3)]
    for rule in ALL
    if rule != "chain" and not ALL[rule].replaces
}
"""Unequal widths, for every mixture of hubs and samples."""


def grown_by_levels(model: Model, rule: str, widths: tuple[int, ...], looks_at_tokens=False):
    return grow(model, len(widths), level_widths(model, rule, widths), looks_at_tokens)


@pytest.mark.parametrize("leaf_to_root", [False, True])
@pytest.mark.parametrize("rule", LEVELS)
def test_level_widths_are_lossless(rule, leaf_to_root):
    for given in (targeted, None):
        for seed, widths in enumerate(LEVELS[rule]):
            model = Model(3, seed, special=0.2, given=given)
            grown = grown_by_levels(model, rule, widths)
            assert {sum(map(len, tree.children.values())) for _, tree in grown} == {sum(widths)}
            emitted = verify(model, grown, leaf_to_root)
            assert total_variation(model, emitted, len(widths) + 1) == 0


@pytest.mark.parametrize("leaf_to_root", [False, True])
@pytest.mark.parametrize("rule", ["traversal", "mixed", "rrsw", "2 hubs"])
def test_level_widths_with_four_tokens(rule, leaf_to_root):
    model = Model(4, 7)
    emitted = verify(model, grown_by_levels(model, rule, (3, 4)), leaf_to_root)
    assert total_variation(model, emitted, 3) == 0


def test_level_widths_vary_with_the_draft():
    """Else their tests show nothing that those of static trees do not."""
    shapes = set()
    for seed in range(4):
        for _, tree in grown_by_levels(Model(3, seed, special=0.0), "mixed", (2, 3, 2)):
            below = {context: len(children) for context, children in tree.children.items()}
            shapes.add(tuple(below.get((child.token,), 0) for child in tree.children[()]))
    assert len(shapes) > 2


def pruned_by_tokens(model: Model, widths: tuple[int, ...]):
    """A level is drawn one node too wide, and loses the node that the draft gives least."""
    wider = tuple(width + 1 for width in widths)
    result = []
    for prob, tree in grown_by_levels(model, "mixed", wider, looks_at_tokens=True):
        children = dict(tree.children)
        for depth in range(len(widths)):
            level = [
                (*context, child.token)
                for context, below in children.items()
                if len(context) == depth
                for child in below
            ]
            kept = set(best_of(tree.scores, level, widths[depth]))
            children = {
                context: tuple(child for child in below if (*context, child.token) in kept)
                if len(context) == depth
                else below
                for context, below in children.items()
                if len(context) <= depth or context[: depth + 1] in kept
            }
        result.append((prob, tree._replace(children=children)))
    return result


@pytest.mark.parametrize("leaf_to_root", [False, True])
def test_a_level_must_not_be_chosen_once_it_is_drawn(leaf_to_root):
    found = []
    for seed in range(3):
        model = Model(3, seed, special=0.0)
        emitted = verify(model, pruned_by_tokens(model, (2, 2)), leaf_to_root)
        assert sum(emitted.values()) == 1
        found.append(total_variation(model, emitted, 3))
    assert max(found) > F(1, 1000)


def two_samples(model: Model, choose) -> list[tuple[Fraction, Grown]]:
    """Two draws below the root, and two below the child that stands first. `choose` says in which
    slots the first two stand, or whether."""
    result = []
    for prob, drawn in sequences(model.draft(()), 2):
        children = choose(model.draft(()), tuple(Child(token, True) for token in drawn))
        tree = {(): children}
        if not children:
            result.append((prob, Grown(tree, {}, {})))
            continue
        first = (children[0].token,)
        for more, below in sequences(model.draft(first), 2):
            tree = {(): children, first: tuple(Child(token, True) for token in below)}
            result.append((prob * more, Grown(tree, dict.fromkeys(tree, frozenset()), {})))
    return result


TOKEN_CHOICES = {
    "as drawn": (lambda q, children: children, True),
    "subtree by token": (
        lambda q, children: tuple(sorted(children, key=lambda child: (-q[child.token], child))),
        False,
    ),
    "kept by token": (
        lambda q, children: tuple(child for child in children if q[child.token] >= F(1, 3)),
        False,
    ),
}


@pytest.mark.parametrize("leaf_to_root", [False, True])
@pytest.mark.parametrize("name", TOKEN_CHOICES)
def test_slots_must_not_be_chosen_by_their_tokens(name, leaf_to_root):
    choose, lossless = TOKEN_CHOICES[name]
    found = []
    for seed in range(4):
        model = Model(3, seed, special=0.0)
        emitted = verify(model, two_samples(model, choose), leaf_to_root)
        assert sum(emitted.values()) == 1
        found.append(total_variation(model, emitted, 3))
    assert (max(found) == 0) if lossless else (max(found) > F(1, 1000))
