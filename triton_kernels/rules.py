# SPDX-License-Identifier: Apache-2.0
"""The table of built-in verification rules. Whatever tells one rule from another is in its row.

How children are drafted and how they are accepted must fit together, so one row describes both.
The kernels get flags made from a row and never see a name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from .constants import MAX_CHILDREN


class Hubs(StrEnum):
    """Which of a node's k children are its most probable tokens, taken without drawing."""

    NONE = "none"
    ALL_BUT_ONE = "k - 1"


class Samples(StrEnum):
    """How the children that are no hubs are drawn from the draft, given the hubs."""

    ONE = "one"
    INDEPENDENT = "independent"
    WITHOUT_REPLACEMENT = "without replacement"


class Direction(StrEnum):
    """In which order verification decides the nodes of a tree."""

    ROOT_TO_LEAF = "root to leaf"
    LEAF_TO_ROOT = "leaf to root"


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
    ordered_slots: bool = False
    """Whether slot 0 holds a token that is distributed as the draft; see `sample_children`."""
    sharpens: bool = False
    """Whether `sharpening` changes the distribution of the sampled child."""
    max_children: int = MAX_CHILDREN
    rates_of: str = ""
    """The rule whose acceptance rates choose the tree of `"tree": "auto"`; by default its own."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates_of", self.rates_of or self.name)

    @property
    def is_recursive(self) -> bool:
        """Whether all children are sampled and tried one after the other, slot by slot."""
        return self.samples is not Samples.ONE

    @property
    def replaces(self) -> bool:
        """Whether one token may be drawn for several slots."""
        return self.samples is Samples.INDEPENDENT

    @property
    def is_leaf_to_root(self) -> bool:
        return self.direction is Direction.LEAF_TO_ROOT


_SPECHUB = "SpecHub (Sun et al., EMNLP 2024, arXiv 2411.05289)"

BUILTIN_RULES: Mapping[str, Rule] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            Rule(
                "ordered",
                "Hubs and one sample; a token that is distributed as the draft comes first, which "
                "pays when the first child has the larger subtree.",
                _SPECHUB,
                Hubs.ALL_BUT_ONE,
                Samples.ONE,
                ordered_slots=True,
                sharpens=True,
            ),
            Rule(
                "unordered",
                "Hubs by rank, then one sample.",
                _SPECHUB,
                Hubs.ALL_BUT_ONE,
                Samples.ONE,
                sharpens=True,
            ),
            Rule(
                "traversal",
                "Drafts as `ordered`; verified from leaf to root, so a node that verification "
                "from the root never reaches may still be accepted.",
                f"{_SPECHUB} with traversal verification (Weng et al., arXiv 2505.12398)",
                Hubs.ALL_BUT_ONE,
                Samples.ONE,
                Direction.LEAF_TO_ROOT,
                ordered_slots=True,
                sharpens=True,
                # This rule accepts a child more often the larger its subtree is, so the rates that
                # it has on complete trees mislead on others. `ordered` drafts alike, and its rates
                # gave the better trees (docs/verification.md).
                rates_of="ordered",
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
                Samples.ONE,
                max_children=1,
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
