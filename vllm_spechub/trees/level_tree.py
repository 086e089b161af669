# SPDX-License-Identifier: Apache-2.0
"""`LevelTree`: trees of which the widths of the levels are fixed, and each step decides the rest.

Which node gets how many children is decided for each request while it drafts, from the draft's
distributions and before any of the children is drawn (`triton_kernels.level_allocation`). Nodes are
numbered level by level and by parent within a level, so a drafted tree is a `TokenTree`.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vllm_spechub.trees.tree import MAX_NODES, TokenTree, Tree
from vllm_spechub.triton_kernels.constants import MAX_CHILDREN

LEVELS = "levels:"
LEVELS_FORM = "levels:WIDTH,WIDTH,..., levels:auto[:NODES[:DEPTH]]"
AUTO_NODES = 15
AUTO_DEPTH = 5
FIRST_WIDTHS = (3, 4)
GROWTHS = (1.0, 1.25)
"""What widths are chosen from: that of the first level, and the factor between those below."""
_AUTO = re.compile(r"levels:auto(?::(\d+)(?::(\d+))?)?")
_WIDTHS = re.compile(r"levels:\s*(\d+(?:\s*,\s*\d+)*)")

Measured = Callable[[int, int], "LevelTree"]
"""A function from numbers of nodes and levels to the widths that were measured for them."""


@dataclass(frozen=True)
class LevelTree(Tree):
    """A tree with so many nodes at each depth.

    Args:
        widths: the numbers of nodes at depth 1, 2 and so on.

    Raises:
        ValueError: no level or an empty one, a level that its nodes' parents have no room for, or
            too many nodes.

    Examples::

        >>> LevelTree((4, 7)).num_nodes
        11
        >>> print(LevelTree.parse("levels:4,7,9,10"))
        levels:4,7,9,10
    """

    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"{self}: every width must be at least 1")
        for above, width in zip((1, *self.widths), self.widths, strict=False):
            if width > MAX_CHILDREN * above:
                raise ValueError(
                    f"{self}: a level of {width} below one of {above} needs more than "
                    f"{MAX_CHILDREN} children per node"
                )
        if self.num_nodes > MAX_NODES:
            raise ValueError(
                f"{self}: a tree has 1 to {MAX_NODES} drafted nodes, got {self.num_nodes}"
            )

    @classmethod
    def parse(cls, spec: str, measured: "Measured | None" = None) -> "LevelTree":
        """Parse "levels:WIDTH,WIDTH,...", or "levels:auto[:NODES[:DEPTH]]" for the widths that were
        measured for a pair of models.

        Args:
            measured: finds these; None where there is no pair.

        Raises:
            ValueError: another form, anything the constructor refuses, or nothing was measured.
        """
        auto = _AUTO.fullmatch(spec.strip())
        if auto is not None:
            nodes = int(auto[1] or AUTO_NODES)
            depth = int(auto[2] or min(AUTO_DEPTH, nodes))
            if not 1 <= depth <= nodes <= MAX_NODES:
                raise ValueError(
                    f"{spec!r}: NODES must be in 1..{MAX_NODES}, and DEPTH in 1..NODES"
                )
            if measured is None:
                raise ValueError(
                    f"{spec!r} is measured for a pair of models, and there is none here; give "
                    "levels:WIDTH,WIDTH,..."
                )
            return measured(nodes, depth)
        match = _WIDTHS.fullmatch(spec.strip())
        if match is None:
            raise ValueError(f"{spec!r} is not a tree, allowed: {LEVELS_FORM}")
        return cls(tuple(int(width) for width in match[1].split(",")))

    @classmethod
    def like(cls, tree: TokenTree) -> "LevelTree":
        """The widths of a static tree's levels."""
        return cls(tree.level_sizes[1:])

    @property
    def level_sizes(self) -> tuple[int, ...]:
        return (1, *self.widths)

    @cached_property
    def internal_nodes(self) -> np.ndarray:
        """All nodes above the last level, each of which may get children. [num_internal] int32"""
        return np.arange(self.num_nodes + 1 - self.widths[-1], dtype=np.int32)

    @property
    def max_children(self) -> int:
        return min(MAX_CHILDREN, max(self.widths))

    @cached_property
    def undrafted(self) -> TokenTree:
        """One of the trees with these widths, which stands for a tree that is not drafted yet."""
        parents: list[int] = []
        first_above, above = 0, 1
        for width in self.widths:
            parents += [first_above + place * above // width for place in range(width)]
            first_above, above = first_above + above, width
        return TokenTree(tuple(parents))

    def __str__(self) -> str:
        return LEVELS + ",".join(map(str, self.widths))


def _widths(nodes: int, depth: int, first: int, growth: float) -> LevelTree:
    """Widths of so many nodes together, if as many have room below each other."""
    widths = [max(1, min(first, MAX_CHILDREN, nodes - (depth - 1)))]
    for level in range(1, depth):
        left, below = nodes - sum(widths), depth - 1 - level
        share = left / sum(growth**i for i in range(below + 1))
        # each of the levels below needs a node
        most = min(MAX_CHILDREN * widths[-1], left - below)
        widths.append(max(1, min(round(share), most)))
    return LevelTree(tuple(widths))


def width_candidates(nodes: int, depth: int, static: Iterable[TokenTree] = ()) -> list[LevelTree]:
    """The widths that a simulation chooses from, of at most so many nodes.

    Args:
        nodes: drafted nodes.
        depth: levels.
        static: trees whose levels are candidates, too.

    Raises:
        ValueError: there are not as many nodes as levels, or too many.
    """
    if not 1 <= depth <= nodes <= MAX_NODES:
        raise ValueError(
            f"level widths need 1 to {MAX_NODES} nodes and as many levels at most, got {nodes} "
            f"nodes and depth {depth}"
        )
    trees = [LevelTree.like(tree) for tree in static]
    trees += [_widths(nodes, depth, first, growth) for first in FIRST_WIDTHS for growth in GROWTHS]
    return list(dict.fromkeys(trees))
