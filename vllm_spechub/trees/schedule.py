# SPDX-License-Identifier: Apache-2.0
"""`TreeSchedule`: which tree is drafted, by the number of running requests.

A verified node costs nearly nothing while a step's time is reading weights, and a full share of it
once the batch fills the device. So few requests draft wide trees, many draft narrow ones or none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from vllm_spechub.trees.best_tree import parse_tree
from vllm_spechub.trees.tree import TokenTree

FORM = "[[FIRST, LAST, TREE], ...]"
OPEN_END = 2**31 - 1


class BatchRange(NamedTuple):
    """Numbers of running requests, both ends included, and what they draft."""

    first: int
    # None has no end
    last: int | None
    # None drafts nothing
    tree: TokenTree | None

    def __str__(self) -> str:
        if self.last is None:
            return f"{self.first} or more"
        return str(self.first) if self.first == self.last else f"{self.first} to {self.last}"


@dataclass(frozen=True)
class TreeSchedule:
    """A tree, or none, for every number of running requests.

    Args:
        ranges: from 1 request on, one behind the other, the last without an end.

    Raises:
        ValueError: a gap, an overlap, no tree at all, or two trees of as many nodes: the number of
            nodes is what vLLM's scheduler tells the worker.
    """

    ranges: tuple[BatchRange, ...]

    def __post_init__(self) -> None:
        start = 1
        for position, (first, last, _tree) in enumerate(self.ranges, start=1):
            if last is None and position < len(self.ranges):
                raise ValueError(f"range {position} has no end, only the last range may have none")
            if first != start:
                raise ValueError(f"range {position} starts at {first}, it must start at {start}")
            if last is not None and last < first:
                raise ValueError(f"range {position} ends at {last}, before it starts at {first}")
            start = (last or 0) + 1
        if not self.ranges or self.ranges[-1].last is not None:
            raise ValueError(
                f"the last range must have null as its end: what do {start} requests draft?"
            )
        if not self.trees:
            raise ValueError("no range has a tree; without speculation leave out the configuration")
        sizes = [tree.num_nodes for tree in self.trees]
        for size in sizes:
            if sizes.count(size) > 1:
                raise ValueError(f"two different trees have {size} nodes; give one of them another")

    @classmethod
    def constant(cls, tree: TokenTree) -> "TreeSchedule":
        """One tree for every batch."""
        return cls((BatchRange(1, None, tree),))

    @classmethod
    def parse(cls, spec: Any, rule: str) -> "TreeSchedule":
        """A schedule from its configuration.

        Args:
            spec: a list of [first, last, tree], where a last of None has no end, and a tree is
                what `parse_tree` takes, or None for no speculation.
            rule: the verification rule that "auto" trees are for.

        Raises:
            ValueError: names the range and what is allowed.
        """
        if not isinstance(spec, Sequence) or isinstance(spec, str):
            raise ValueError(f"{spec!r} is not {FORM} or 'auto'")
        ranges = []
        for position, entry in enumerate(spec, start=1):
            if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 3:
                raise ValueError(f"range {position} is {entry!r}, not [FIRST, LAST, TREE]")
            first, last, tree = entry
            for name, value in (("FIRST", first), ("LAST", last)):
                if type(value) is not int and not (name == "LAST" and value is None):
                    raise ValueError(f"range {position}: {name} is {value!r}, not a number")
            try:
                shape = None if tree is None else parse_tree(tree, rule)
            except ValueError as error:
                raise ValueError(f"range {position}: {error}, or null") from None
            ranges.append(BatchRange(first, last, shape))
        return cls(tuple(ranges))

    @cached_property
    def trees(self) -> tuple[TokenTree, ...]:
        """The different trees, the one with most nodes first."""
        trees = {r.tree: None for r in self.ranges if r.tree is not None}
        return tuple(sorted(trees, key=lambda tree: -tree.num_nodes))

    @property
    def depth(self) -> int:
        """Depth of the deepest tree."""
        return max(tree.depth for tree in self.trees)

    @property
    def max_children(self) -> int:
        """Most children of any node of any tree."""
        return max(int(tree.num_children.max()) for tree in self.trees)

    @property
    def pauses(self) -> bool:
        """Whether some batch sizes draft nothing."""
        return any(r.tree is None for r in self.ranges)

    def index(self, num_nodes: int) -> int | None:
        """Which of `trees` has so many nodes. None for no nodes, which is no tree."""
        if num_nodes == 0:
            return None
        return [tree.num_nodes for tree in self.trees].index(num_nodes)

    def nodes_by_batch_size(self) -> list[tuple[int, int, int]] | None:
        """The schedule as vLLM's dynamic speculative decoding takes it, None if it is constant."""
        if len(self.ranges) == 1:
            return None
        return [
            (first, OPEN_END if last is None else last, tree.num_nodes if tree else 0)
            for first, last, tree in self.ranges
        ]
