# SPDX-License-Identifier: Apache-2.0
"""`TreeSchedule`: which tree is drafted, by the number of running requests.

While a step mostly waits for weights, verifying one more node is nearly free; once the batch keeps
the processor busy, it costs as much as any other token. So a few requests draft wide trees, and
many draft narrow ones or none.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, StrictInt, TypeAdapter, ValidationError, ValidationInfo

from vllm_spechub.trees.best_tree import parse_tree
from vllm_spechub.trees.level_tree import LevelTree, Measured
from vllm_spechub.trees.tree import TokenTree, Tree
from vllm_spechub.trees.validation import one_line

ENTRY = ("FIRST", "LAST", "TREE")
FORM = f"[[{', '.join(ENTRY)}], ...] or 'auto'"
OPEN_END = 2**31 - 1


def _parse(value: Any, info: ValidationInfo[dict[str, Any]]) -> Tree | None:
    if value is None:
        return None
    try:
        return parse_tree(value, **info.context)
    except ValueError as error:
        raise ValueError(f"{error}, or null") from None


_ENTRIES = TypeAdapter(
    list[
        tuple[
            StrictInt,
            StrictInt | None,
            Annotated[TokenTree | LevelTree | None, BeforeValidator(_parse)],
        ]
    ]
)


def _describe(where: tuple[int | str, ...]) -> tuple[str, str | None]:
    """What `one_line` asks about the part of a schedule at a place."""
    match where:
        case ():
            return "the schedule", FORM
        case (int(position),):
            return f"range {position + 1}", f"[{', '.join(ENTRY)}]"
        case (int(position), int(part), *_):
            number = "a number" if ENTRY[part] == "FIRST" else "a number or null"
            return f"range {position + 1}: {ENTRY[part]}", number
    raise AssertionError(where)


class BatchRange(NamedTuple):
    """The tree that is drafted while the number of running requests is in a range, both ends
    included."""

    first: int
    # None has no end
    last: int | None
    # None drafts nothing
    tree: TokenTree | LevelTree | None

    def __str__(self) -> str:
        if self.last is None:
            return f"{self.first} or more"
        return str(self.first) if self.first == self.last else f"{self.first} to {self.last}"


@dataclass(frozen=True)
class TreeSchedule:
    """A tree, or none, for every number of running requests.

    Args:
        ranges: the first starts at 1 request, each of the others right after the one before it
            ends, and the last has no end.

    Raises:
        ValueError: a gap, an overlap, no tree at all, or two trees with the same number of nodes,
            which is how vLLM's scheduler tells the worker which tree to draft.
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
                f"the last range must have null as its end, to also cover {start} and more requests"
            )
        if not self.trees:
            raise ValueError(
                "no range has a tree; to run without speculation, leave out speculative_config"
            )
        sizes = [tree.num_nodes for tree in self.trees]
        for size in sizes:
            if sizes.count(size) > 1:
                raise ValueError(
                    f"two different trees have {size} nodes; their numbers of nodes must differ"
                )

    @classmethod
    def constant(cls, tree: TokenTree | LevelTree) -> "TreeSchedule":
        """The schedule that drafts the same tree for any number of running requests."""
        return cls((BatchRange(1, None, tree),))

    @classmethod
    def parse(cls, spec: Any, rule: str, measured: Measured | None = None) -> "TreeSchedule":
        """Parse the ranges of `tree_by_batch_size`.

        Args:
            spec: a list of [first, last, tree], where a last of None has no end, and a tree is
                what `parse_tree` takes, or None for no speculation.
            rule: the verification rule that "auto" trees are for.
            measured: as `parse_tree` takes it.

        Raises:
            ValueError: names the range and what is allowed.
        """
        try:
            entries = _ENTRIES.validate_python(spec, context={"rule": rule, "measured": measured})
        except ValidationError as error:
            raise ValueError(one_line(error, _describe)) from None
        return cls(tuple(BatchRange(*entry) for entry in entries))

    @cached_property
    def trees(self) -> tuple[Tree, ...]:
        """The different trees, the one with most nodes first."""
        trees = {r.tree: None for r in self.ranges if r.tree is not None}
        return tuple(sorted(trees, key=lambda tree: -tree.num_nodes))

    def most_requests(self, max_num_reqs: int) -> dict[Tree, int]:
        """For each tree, the most requests of a step that drafts it, if no step has more than
        `max_num_reqs`. In the order of `trees`."""
        most = dict.fromkeys(self.trees, 0)
        for first, last, tree in self.ranges:
            if tree is not None and first <= max_num_reqs:
                most[tree] = max(most[tree], min(last or max_num_reqs, max_num_reqs))
        return most

    @property
    def depth(self) -> int:
        """The depth of the deepest tree."""
        return max(tree.depth for tree in self.trees)

    @property
    def max_children(self) -> int:
        """The most children that any node of any tree has."""
        return max(tree.max_children for tree in self.trees)

    @property
    def pauses(self) -> bool:
        """Whether some batch sizes draft nothing."""
        return any(r.tree is None for r in self.ranges)

    def index(self, num_nodes: int) -> int | None:
        """The index in `trees` of the tree with that many nodes; None for 0 nodes, which stands for
        drafting nothing.

        Raises:
            ValueError: no tree has that many nodes.
        """
        if num_nodes == 0:
            return None
        return [tree.num_nodes for tree in self.trees].index(num_nodes)

    def nodes_by_batch_size(self) -> list[tuple[int, int, int]] | None:
        """The schedule as vLLM's dynamic speculative decoding takes it: (first, last, number of
        drafted nodes) for each range. None if there is one range only."""
        if len(self.ranges) == 1:
            return None
        return [
            (first, OPEN_END if last is None else last, tree.num_nodes if tree else 0)
            for first, last, tree in self.ranges
        ]
