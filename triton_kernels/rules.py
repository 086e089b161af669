# SPDX-License-Identifier: Apache-2.0
"""The table of built-in verification rules. Whatever tells one rule from another is in its row.

How children are drafted and how they are accepted must fit together, so one row describes both.
The kernels get flags made from a row and never see a name. All rules share the loop over a node's
slots that `verification.node` describes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from types import MappingProxyType

from .constants import MAX_CHILDREN


class Hubs(Enum):
    """Which of a node's k children are its most probable tokens, taken without drawing.

    The values are: children that are never hubs; how many of the others are whatever the draft; and
    how many are where the draft is confident, giving each more than `constants.CONFIDENT`.
    """

    NONE = (0, 0, 0)
    CONFIDENT = (1, 1, MAX_CHILDREN)
    ALL_BUT_ONE = (1, MAX_CHILDREN, MAX_CHILDREN)
    ALL = (0, MAX_CHILDREN, MAX_CHILDREN)


class Samples(StrEnum):
    """How the children that are no hubs are drawn from the draft off the hubs."""

    NONE = "none"
    INDEPENDENT = "independent"
    WITHOUT_REPLACEMENT = "without replacement"


class Direction(StrEnum):
    """In which order verification decides the nodes of a tree."""

    ROOT_TO_LEAF = "root to leaf"
    LEAF_TO_ROOT = "leaf to root"


class Subtrees(StrEnum):
    """Which child gets which subtree: slots are numbered from the largest on in the best trees."""

    BY_KIND = "hubs by rank, then samples as drawn"
    BY_EXPECTED_ACCEPTANCE = "by expected acceptance"


@dataclass(frozen=True)
class Rule:
    """One built-in verification rule."""

    name: str
    summary: str
    """One sentence for documentation and `--help`."""
    source: str
    hubs: Hubs
    samples: Samples
    direction: Direction = Direction.ROOT_TO_LEAF
    subtrees: Subtrees = Subtrees.BY_KIND
    sharpens: bool = False
    """Whether `sharpening` changes the distribution of the sampled children."""
    max_children: int = MAX_CHILDREN
    rates_of: str = ""
    """The rule whose acceptance rates choose the tree of `"tree": "auto"`; by default its own."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates_of", self.rates_of or self.name)

    @property
    def replaces(self) -> bool:
        """Whether one token may be drawn for several slots."""
        return self.samples is Samples.INDEPENDENT

    @property
    def is_leaf_to_root(self) -> bool:
        return self.direction is Direction.LEAF_TO_ROOT

    @property
    def ranks_subtrees(self) -> bool:
        """Whether children are put into slots by their expected acceptance."""
        return self.subtrees is Subtrees.BY_EXPECTED_ACCEPTANCE


_SPECHUB = "SpecHub (Sun et al., EMNLP 2024, arXiv 2411.05289)"
_TRAVERSAL = "traversal verification (Weng et al., arXiv 2505.12398)"

BUILTIN_RULES: Mapping[str, Rule] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            Rule(
                "traversal",
                "Hubs and one sample; verified from leaf to root, so a node that verification "
                "from the root never reaches may still be accepted.",
                f"{_SPECHUB} with {_TRAVERSAL}",
                Hubs.ALL_BUT_ONE,
                Samples.WITHOUT_REPLACEMENT,
                Direction.LEAF_TO_ROOT,
                Subtrees.BY_EXPECTED_ACCEPTANCE,
                sharpens=True,
                # This rule accepts a child more often the larger its subtree is, so the rates that
                # it has on complete trees mislead on others. `ordered` drafts alike.
                rates_of="ordered",
            ),
            Rule(
                "mixed",
                "As many hubs as the draft is confident of, the other children drawn without "
                "replacement; verified from leaf to root.",
                f"{_SPECHUB} with {_TRAVERSAL}",
                Hubs.CONFIDENT,
                Samples.WITHOUT_REPLACEMENT,
                Direction.LEAF_TO_ROOT,
                Subtrees.BY_EXPECTED_ACCEPTANCE,
                sharpens=True,
            ),
            Rule(
                "ordered",
                "Hubs and one sample, verified from the root; the child that is expected to be "
                "accepted most often comes first, where the larger subtree is.",
                _SPECHUB,
                Hubs.ALL_BUT_ONE,
                Samples.WITHOUT_REPLACEMENT,
                subtrees=Subtrees.BY_EXPECTED_ACCEPTANCE,
                sharpens=True,
            ),
            Rule(
                "unordered",
                "Hubs by rank, then one sample, verified from the root.",
                _SPECHUB,
                Hubs.ALL_BUT_ONE,
                Samples.WITHOUT_REPLACEMENT,
                sharpens=True,
            ),
            Rule(
                "rrs",
                "Independent draws, tried one after the other.",
                "SpecInfer (Miao et al., ASPLOS 2024, arXiv 2305.09781)",
                Hubs.NONE,
                Samples.INDEPENDENT,
            ),
            Rule(
                "rrsw",
                "Draws without replacement, tried one after the other.",
                "Sequoia (Chen et al., NeurIPS 2024, arXiv 2402.12374)",
                Hubs.NONE,
                Samples.WITHOUT_REPLACEMENT,
            ),
            Rule(
                "chain",
                "One child per node, standard rejection sampling.",
                "speculative decoding (Leviathan et al., ICML 2023, arXiv 2211.17192)",
                Hubs.NONE,
                Samples.WITHOUT_REPLACEMENT,
                max_children=1,
            ),
            Rule(
                "match",
                "The most probable tokens as drafts; the token that plain decoding draws decides "
                "at every node, so that a seed gives the text that it gives without speculation.",
                "the target's own draw, as greedy speculative decoding has it",
                Hubs.ALL,
                Samples.NONE,
            ),
        )
    }
)
"""The rows by name."""

DEFAULT_RULE = "traversal"
"""The rule that emits most tokens per step, measured in docs/verification.md."""


def rates_of(name: str) -> str:
    """The rule whose acceptance rates choose trees for a rule; other packages' rules use theirs."""
    return BUILTIN_RULES[name].rates_of if name in BUILTIN_RULES else name


def builtin_rule(name: str, sharpening: float, max_children: int) -> Rule:
    """The row of a built-in rule.

    Raises:
        ValueError: no built-in rule has the name, or the rule does not take the sharpening or as
            many children; one line that names the argument.
    """
    if name not in BUILTIN_RULES:
        raise ValueError(
            f"rule is {name!r}, allowed: {', '.join(BUILTIN_RULES)} (built-in rules only)"
        )
    rule = BUILTIN_RULES[name]
    check_sharpening(sharpening)
    if sharpening != 1.0 and not rule.sharpens:
        allowed = ", ".join(row.name for row in BUILTIN_RULES.values() if row.sharpens)
        raise ValueError(f"sharpening must be 1 with rule {name!r}, allowed with: {allowed}")
    if max_children > rule.max_children:
        most = "one child" if rule.max_children == 1 else f"at most {rule.max_children} children"
        raise ValueError(f"rule {name!r} takes {most} per node")
    return rule


def check_sharpening(sharpening: float) -> None:
    """Raise a ValueError unless it can be an exponent."""
    if not 0.0 < sharpening < float("inf"):
        raise ValueError(f"sharpening is {sharpening}, allowed: a finite number above 0")
