# SPDX-License-Identifier: Apache-2.0
"""Trees over small vocabularies in exact arithmetic: every draft, every outcome, every token.

Nothing here is code under test: a node's children are drafted and verified as the rules define it,
with whole vectors of fractions where the code has two scalars.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from typing import NamedTuple

F = Fraction
Row = tuple[Fraction, ...]
"""A distribution, or 0 throughout: a draft that masks every token."""
Context = tuple[int, ...]
Emitted = dict[Context, Fraction]
"""Probability of every sequence that one step emits."""
Tree = tuple
"""The subtrees of the root by slot; a leaf has none."""

SHARES = (F(1), F(11, 100), F(5, 100), F(3, 100))


@dataclass(frozen=True)
class Drafting:
    """How a rule drafts children and in which direction it verifies them."""

    # how many of k children are hubs, from the draft's distribution
    hubs: Callable[[Row, int], int]
    replaces: bool = False
    by_expectation: bool = False
    leaf_to_root: bool = False
    sharpens: bool = False

    def towards(self, leaf_to_root: bool) -> "Drafting":
        """The same drafts, verified in this direction."""
        return replace(self, leaf_to_root=leaf_to_root)


def _confident(q: Row, k: int) -> int:
    return 0 if k == 1 else min(max(sum(x > F(1, 5) for x in q), 1), k - 1)


DRAFTING = {
    "traversal": Drafting(lambda q, k: k - 1, False, True, True, True),
    "mixed": Drafting(_confident, False, True, True, True),
    "ordered": Drafting(lambda q, k: k - 1, False, True, False, True),
    "unordered": Drafting(lambda q, k: k - 1, False, False, False, True),
    "rrs": Drafting(lambda q, k: 0, True),
    "rrsw": Drafting(lambda q, k: 0),
    "chain": Drafting(lambda q, k: 0),
    "match": Drafting(lambda q, k: k),
}
FIXED_HUBS = {
    f"{m} hubs": Drafting(lambda q, k, m=m: min(m, k), False, True, True, True) for m in range(4)
}
"""Drafts that no rule has, but the loop over slots verifies."""


class Child(NamedTuple):
    token: int
    sampled: bool


def normalised(weights: Iterable) -> Row:
    weights = [F(weight) for weight in weights]
    return tuple(weight / sum(weights) for weight in weights)


def ranked(q: Row) -> list[int]:
    return sorted(range(len(q)), key=lambda token: (-q[token], token))


def expected_acceptance(z: Fraction, number: int) -> Fraction:
    """Of a sample, from the draft's mass off the hubs and how many were drawn before."""
    return z * (1 - F(9, 20) * z) if number == 0 else z * SHARES[number]


def sequences(weights: Row, count: int, replaces: bool = False) -> list[tuple[Fraction, Context]]:
    """All that `count` draws may give, fewer where there are not as many tokens to draw."""
    drawn = [(F(1), ())]
    for _ in range(count):
        longer = []
        for prob, before in drawn:
            free = [0 if t in before and not replaces else w for t, w in enumerate(weights)]
            total = sum(free)
            longer += [(prob * w / total, (*before, t)) for t, w in enumerate(free) if w]
            longer += [(prob, before)] * (total == 0)
        drawn = longer
    return drawn


@cache
def drafts(
    q: Row, k: int, drafting: Drafting, power: int = 1
) -> list[tuple[Fraction, tuple[Child, ...]]]:
    """Every draft of a node: its probability, and its children in slot order."""
    by_rank = ranked(q)
    num_hubs = drafting.hubs(q, k) if any(q) else k
    hubs = by_rank[:num_hubs]
    weights = tuple(F(0) if t in hubs else x**power for t, x in enumerate(q))
    z = sum(x for t, x in enumerate(q) if t not in hubs)
    result = []
    for prob, drawn in sequences(weights, k - num_hubs, drafting.replaces):
        missing = k - num_hubs - len(drawn)
        stand_ins = [t for t in by_rank[num_hubs:] if t not in drawn][:missing]
        samples = [(expected_acceptance(z, n), Child(t, True)) for n, t in enumerate(drawn)]
        certain = [(q[t], Child(t, False)) for t in [*hubs, *stand_ins]]
        slots = [*certain[:num_hubs], *samples, *certain[num_hubs:]]
        if drafting.by_expectation:
            slots = sorted([*samples, *certain], key=lambda pair: -pair[0])
        result.append((prob, tuple(child for _, child in slots)))
    return result


def visiting_order(children: tuple[Child, ...]) -> list[int]:
    """Samples by slot, then hubs by slot."""
    return sorted(range(len(children)), key=lambda slot: (not children[slot].sampled, slot))


class Outcome(NamedTuple):
    # [k]: what a child is accepted with when it is visited
    visit: list[Fraction]
    # what is left to emit once all have failed; its sum is what the node is then accepted with
    owed: list[Fraction]


def node_outcome(
    p: Row,
    weights: Row,
    children: tuple[Child, ...],
    acceptance: Fraction,
    replaces: bool = False,
    left_out: frozenset[int] = frozenset(),
) -> Outcome:
    """What happens at a node that is visited with a path acceptance.

    Args:
        weights: what samples are drawn in proportion to, hubs not yet left out.
        left_out: hubs that were drafted and are no children any more.
    """
    hubs = left_out | {child.token for child in children if not child.sampled}
    owed = [acceptance * x for x in p]
    visit, drawn = [F(0)] * len(children), set()
    for slot in visiting_order(children):
        token, sampled = children[slot]
        if sampled:
            gone = hubs if replaces else hubs | drawn
            draft = normalised(0 if t in gone else w for t, w in enumerate(weights))
            drawn.add(token)
        else:
            draft = [F(int(t == token)) for t in range(len(p))]
        visit[slot] = min(F(1), owed[token] / draft[token])
        failing = 1 - sum(map(min, owed, draft))
        owed = [max(x - y, F(0)) / failing if failing else F(0) for x, y in zip(owed, draft)]  # noqa: B905
    return Outcome(visit, owed)


def add(emitted: Emitted, more: Emitted, factor: Fraction) -> None:
    for sequence, mass in more.items():
        emitted[sequence] += factor * mass


def emit(
    context: Context,
    children: tuple[Child, ...],
    outcome: Outcome,
    leaf_to_root: bool,
    below: Callable[[int, Fraction], tuple[Emitted, Fraction]],
) -> tuple[Emitted, Fraction]:
    """What a node with these children emits, and the probability that it fails. `below(slot, a)`
    says both of a child that is visited with path acceptance a."""
    emitted, reach = defaultdict(Fraction), F(1)
    for slot in visiting_order(children):
        visit = outcome.visit[slot]
        if not visit or not reach:
            continue
        if leaf_to_root:
            more, failed = below(slot, visit)
            add(emitted, more, reach)
            reach *= failed
        else:
            add(emitted, below(slot, F(1))[0], reach * visit)
            reach *= 1 - visit
    add(emitted, {(*context, t): x for t, x in enumerate(outcome.owed) if x}, reach)
    return emitted, reach * (1 - sum(outcome.owed))


SPECIAL = {
    size: [
        normalised([1] * size),  # all tied
        normalised(range(1, size + 1)),
        normalised([1, *[0] * (size - 1)]),
        normalised([*[0] * (size - 1), 1]),
        normalised([1, 0] * (size // 2) + [1] * (size % 2)),  # zeros
        normalised([0, 1] * (size // 2) + [0] * (size % 2)),  # the other half
        normalised([10**9, *[1] * (size - 1)]),  # confident
        normalised([3, 3, *[1] * (size - 2)]),  # tied hubs
        normalised([2, 8, *[0] * (size - 2)]),  # one at the threshold of `mixed`, one above
        normalised([21, 21, *[58 // (size - 2)] * (size - 2)]),  # all above it, or just two
    ]
    for size in (3, 4)
}


@dataclass
class Model:
    """A target and a draft that differ in every context, some of them special."""

    vocab_size: int
    seed: int
    special: float = 0.3
    # a draft's distributions in place of random ones
    given: Callable[[Context], Row] | None = None

    def __post_init__(self):
        self.target = cache(lambda context: self._row("p", context))
        self.draft = cache(lambda context: self._draft(context))

    def _draft(self, context: Context) -> Row:
        if self.given is not None:
            return self.given(context)
        if random.Random(f"none{self.seed}{context}").random() < self.special / 4:
            return (F(0),) * self.vocab_size
        return self._row("q", context)

    def _row(self, name: str, context: Context) -> Row:
        source = random.Random(f"{name}{self.seed}{context}")
        if source.random() < self.special:
            return source.choice(SPECIAL[self.vocab_size])
        weights = [source.randint(0, 7) for _ in range(self.vocab_size)]
        return normalised(weights if any(weights) else [1] * self.vocab_size)


def total_variation(model: Model, emitted: Emitted, length: int) -> Fraction:
    """Between emitted sequences, continued with the target, and the target's."""
    difference = defaultdict(Fraction)
    for start, sign in ((emitted, 1), ({(): F(1)}, -1)):
        level = dict(start)
        for _ in range(length):
            longer = defaultdict(Fraction)
            for sequence, mass in level.items():
                if len(sequence) == length:
                    longer[sequence] += mass
                    continue
                for token, x in enumerate(model.target(sequence)):
                    longer[(*sequence, token)] += mass * x
            level = longer
        add(difference, level, F(sign))
    return sum(map(abs, difference.values())) / 2


def expected_length(emitted: Emitted) -> Fraction:
    return sum(len(sequence) * mass for sequence, mass in emitted.items())


class Case(NamedTuple):
    """One node of one draft, as it was visited."""

    p: Row
    weights: Row
    children: tuple[Child, ...]
    acceptance: Fraction
    replaces: bool
    outcome: Outcome


@dataclass
class Walk:
    """What a rule emits with one tree: the step from the root, in exact arithmetic."""

    model: Model
    drafting: Drafting
    power: int = 1
    cases: list[Case] = field(default_factory=list)

    def __post_init__(self):
        self.below = cache(self._below)

    def _below(
        self, context: Context, tree: Tree, acceptance: Fraction
    ) -> tuple[Emitted, Fraction]:
        """Of all drafts below a context: what is emitted, and how often the node fails."""
        p, q = self.model.target(context), self.model.draft(context)
        if not tree:
            return {(*context, t): acceptance * x for t, x in enumerate(p) if x}, 1 - acceptance
        emitted, failed = defaultdict(Fraction), F(0)
        weights = tuple(x**self.power for x in q)
        for prob, children in drafts(q, len(tree), self.drafting, self.power):
            case = (p, weights, children, acceptance, self.drafting.replaces)
            outcome = node_outcome(*case)
            self.cases.append(Case(*case, outcome))

            def below(slot, visit, children=children):
                return self.below((*context, children[slot].token), tree[slot], visit)

            more, left = emit(context, children, outcome, self.drafting.leaf_to_root, below)
            add(emitted, more, prob)
            failed += prob * left
        # a node is accepted with exactly the probability that it is visited with
        assert failed == 1 - acceptance
        return emitted, failed

    def step(self, tree: Tree) -> Emitted:
        return self.below((), tree, F(1))[0]


def accepted(p: Row, q: Row, k: int, drafting: Drafting, power: int = 1) -> list[Fraction]:
    """What every slot of a node with k leaves is accepted with. [k]"""
    slots = [F(0)] * k
    weights = tuple(x**power for x in q)
    for reach, children in drafts(q, k, drafting, power):
        outcome = node_outcome(p, weights, children, F(1), drafting.replaces)
        for slot in visiting_order(children):
            slots[slot] += reach * outcome.visit[slot]
            reach *= 1 - outcome.visit[slot]
    return slots


class Grown(NamedTuple):
    """One tree, all of its tokens drawn, whose shape may depend on them."""

    # of every node that has or had some, by its tokens from the root
    children: dict[Context, tuple[Child, ...]]
    # hubs as drafted, whether they are children still or not
    hubs: dict[Context, frozenset[int]]
    # what is expected of every node below the root, from the draft
    scores: dict[Context, Fraction]


Plan = dict[Context, tuple[int, int]]
"""How many samples and hubs the nodes of a level get."""


def node_scores(q: Row, num_samples: int, num_hubs: int) -> tuple[list[Fraction], list[Fraction]]:
    """Of samples and of hubs, from the draft alone."""
    hubs = [q[t] for t in ranked(q)[:num_hubs]]
    z = 1 - sum(hubs)
    if (num_samples, num_hubs) == (1, 0):
        return [(1 + max(q) ** 2) / 2], []
    return [expected_acceptance(z, n) for n in range(num_samples)], hubs


def level_counts(
    rows: list[Row], reach: list[Fraction], width: int, drafting: Drafting, most: int
) -> list[int]:
    """How many children each node of a level gets, `width` in all: one after the other goes where
    it adds most to the expected number of accepted tokens."""
    gains = []
    for place, (q, above) in enumerate(zip(rows, reach, strict=True)):
        best, falling = F(0), None
        for k in range(1, most + 1):
            num_hubs = drafting.hubs(q, k)
            value = sum(map(sum, node_scores(q, k - num_hubs, num_hubs)))
            gain = max(value - best, F(0))
            falling = gain if falling is None else min(falling, gain)
            best = max(best, value)
            gains.append((-above * falling, place, k))
    counts = [0] * len(rows)
    for _, place, _ in sorted(gains)[:width]:
        counts[place] += 1
    return counts


def grow(
    model: Model,
    depth: int,
    plan_level: Callable[[Grown, list[Context]], Plan],
    looks_at_tokens: bool = False,
) -> list[tuple[Fraction, Grown]]:
    """Every tree, with its probability, that is drafted level by level.

    Args:
        plan_level: decides what a level gets before any of it is drawn.
        looks_at_tokens: a sample scores what the draft gives its token, which is not allowed.
    """
    grown = [(F(1), Grown({}, {}, {}), [()])]
    for _ in range(depth):
        longer = []
        for prob, tree, level in grown:
            plan = plan_level(tree, level)
            options = []
            for context, (num_samples, num_hubs) in plan.items():
                q = model.draft(context)
                hubs = ranked(q)[:num_hubs]
                free = tuple(F(0) if t in hubs else x for t, x in enumerate(q))
                options.append([])
                for x, drawn in sequences(free, num_samples):
                    # where nothing is left to draw from, the next in rank
                    others = [t for t in ranked(q)[num_hubs:] if t not in drawn]
                    more = others[: num_samples - len(drawn)]
                    options[-1].append((x, context, [*hubs, *more], drawn))
            for combination in itertools.product(*options):
                tree_prob, below = prob, []
                children, all_hubs, scores = (dict(part) for part in tree)
                for x, context, hubs, drawn in combination:
                    tree_prob *= x
                    q, above = model.draft(context), scores.get(context, F(1))
                    of_samples, of_hubs = node_scores(q, len(drawn), len(hubs))
                    if looks_at_tokens:
                        of_samples = [q[t] for t in drawn]
                    children[context] = (
                        *(Child(t, True) for t in drawn),
                        *(Child(t, False) for t in hubs),
                    )
                    all_hubs[context] = frozenset(hubs)
                    for child, score in zip(children[context], of_samples + of_hubs, strict=True):
                        scores[(*context, child.token)] = above * score
                        below.append((*context, child.token))
                longer.append((tree_prob, Grown(children, all_hubs, scores), below))
        grown = longer
    return [(prob, tree) for prob, tree, _ in grown]


def best_of(scores: dict[Context, Fraction], contexts: list[Context], count: int) -> list[Context]:
    order = {context: place for place, context in enumerate(contexts)}
    return sorted(contexts, key=lambda c: (-scores.get(c, F(1)), len(c), order[c]))[:count]


def verify(model: Model, grown: list[tuple[Fraction, Grown]], leaf_to_root: bool) -> Emitted:
    """What the verification of grown trees emits."""
    emitted = defaultdict(Fraction)
    for prob, tree in grown:

        def below(context: Context, acceptance: Fraction, tree=tree) -> tuple[Emitted, Fraction]:
            p = model.target(context)
            children = tree.children.get(context, ())
            if not children:
                return {(*context, t): acceptance * x for t, x in enumerate(p)}, 1 - acceptance
            outcome = node_outcome(
                p, model.draft(context), children, acceptance, left_out=tree.hubs[context]
            )
            return emit(
                context,
                children,
                outcome,
                leaf_to_root,
                lambda slot, visit: below((*context, children[slot].token), visit),
            )

        more, failed = below((), F(1))
        assert failed == 0
        add(emitted, more, prob)
    return emitted
