# SPDX-License-Identifier: Apache-2.0
"""Draft trees: shapes, numbering and the tables that the rest of the package reads.

Node 0 is the root, the last emitted token. Drafted nodes are numbered from 1 in breadth-first
order, so every prefix of them contains its nodes' ancestors: when the scheduler truncates a tree to
fit its token budget, what is left is a tree.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import SupportsIndex

import numpy as np

from vllm_spechub.triton_kernels.constants import MAX_CHILDREN

MAX_NODES = 63
"""The largest number of drafted nodes: with the root they fill one 64-bit ancestor mask."""

FAMILIES = "binary:DEPTH, kary:BRANCHING:DEPTH, chain:DEPTH, caterpillar:DEPTH[:BRANCHING]"
LISTS = "a list of parents such as [0, 0, 1], or a list of paths such as [[0], [1], [0, 0]]"
_FAMILY = re.compile(r"(binary|kary|chain|caterpillar)((?::\d+)+)")


def _parent(place: int, parent: SupportsIndex) -> int:
    try:
        return index(parent)
    except TypeError:
        raise ValueError(
            f"parents[{place}] = {parent!r} is no node's number; TokenTree.from_paths takes paths"
        ) from None


class Tree(ABC):
    """What is fixed of a draft tree before it is drafted: how many nodes each depth has, and which
    nodes may have children."""

    @property
    @abstractmethod
    def level_sizes(self) -> tuple[int, ...]:
        """Nodes of every depth, the root's one first."""

    @property
    @abstractmethod
    def internal_nodes(self) -> np.ndarray:
        """The nodes that may have children, in breadth-first order. [num_internal] int32"""

    @property
    @abstractmethod
    def max_children(self) -> int:
        """The most children that a node may have."""

    @property
    def num_nodes(self) -> int:
        """The number of drafted nodes, without the root."""
        return sum(self.level_sizes) - 1

    @property
    def depth(self) -> int:
        """The depth of the deepest node; the root has depth 0."""
        return len(self.level_sizes) - 1

    @cached_property
    def depths(self) -> np.ndarray:
        """The depth of every node, root first. [num_nodes + 1] int32"""
        return np.repeat(np.arange(self.depth + 1, dtype=np.int32), self.level_sizes)

    @cached_property
    def internal_index(self) -> np.ndarray:
        """Every node's index among the internal nodes, -1 for a leaf. [num_nodes + 1] int32"""
        index = np.full(self.num_nodes + 1, -1, dtype=np.int32)
        index[self.internal_nodes] = np.arange(len(self.internal_nodes))
        return index

    def internal_levels(self) -> list[np.ndarray]:
        """The internal nodes of each depth from 0 to `depth - 1`, int32 each. One draft pass
        expands one of these levels."""
        depths = self.depths[self.internal_nodes]
        return [self.internal_nodes[depths == d] for d in range(self.depth)]


@dataclass(frozen=True)
class TokenTree(Tree):
    """A static draft tree.

    Args:
        parents: one entry per drafted node, its parent's number. Drafted nodes are numbered from
            1 in breadth-first order and 0 is the root, so `parents` never decreases and
            `parents[i] <= i`. The order of siblings is the order of their slots.

    Raises:
        ValueError: the tree is empty or too large, a node has too many children, or the nodes are
            not in breadth-first order.

    Examples::

        >>> TokenTree((0, 0, 1, 1)).depth
        2
        >>> TokenTree.complete(branching=2, depth=3).num_nodes
        14
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        parents = tuple(_parent(place, parent) for place, parent in enumerate(self.parents))
        object.__setattr__(self, "parents", parents)
        if not 1 <= self.num_nodes <= MAX_NODES:
            raise ValueError(f"a tree has 1 to {MAX_NODES} drafted nodes, got {self.num_nodes}")
        for node, parent in enumerate(self.parents, start=1):
            if not 0 <= parent < node:
                raise ValueError(
                    f"parents[{node - 1}] = {parent}: node {node} needs a parent in 0..{node - 1}"
                )
        if any(a > b for a, b in zip(self.parents, self.parents[1:], strict=False)):
            raise ValueError(
                f"parents must not decrease (breadth-first order), got {list(self.parents)}"
            )
        most = self.max_children
        if most > MAX_CHILDREN:
            node = int(self.num_children.argmax())
            raise ValueError(f"node {node} has {most} children, at most {MAX_CHILDREN} allowed")

    @classmethod
    def complete(cls, branching: int, depth: int) -> "TokenTree":
        """The tree of this depth in which every node above the last level has `branching` children.

        Raises:
            ValueError: as the constructor does.
        """
        return cls._grow(depth, lambda _level, width: [branching] * width)

    @classmethod
    def chain(cls, depth: int) -> "TokenTree":
        """The tree with one node per depth, as in ordinary speculative decoding."""
        return cls.complete(1, depth)

    @classmethod
    def caterpillar(cls, depth: int, branching: int = 2) -> "TokenTree":
        """The tree in which the first node of each level has `branching` children, the others none.

        Raises:
            ValueError: as the constructor does.
        """
        return cls._grow(depth, lambda _level, width: [branching] + [0] * (width - 1))

    @classmethod
    def _grow(cls, depth: int, children_of_level: Callable[[int, int], list[int]]) -> "TokenTree":
        """Build a tree level by level.

        `children_of_level(level, width)` returns the number of children of each of the `width`
        nodes at depth `level`.
        """
        parents: list[int] = []
        level = [0]
        for d in range(depth):
            first = len(parents) + 1
            for node, count in zip(level, children_of_level(d, len(level)), strict=True):
                parents.extend([node] * count)
            if len(parents) > MAX_NODES:
                raise ValueError(
                    f"a tree has 1 to {MAX_NODES} drafted nodes, this one has more at depth {d + 1}"
                )
            level = list(range(first, len(parents) + 1))
        return cls(tuple(parents))

    @classmethod
    def parse(cls, spec: "str | Sequence[object] | TokenTree") -> "TokenTree":
        """Parse a tree's configuration: a family such as "binary:3", a list of parents, or a list
        of paths as `from_paths` takes it.

        Raises:
            ValueError: an unknown family, or anything the constructor or `from_paths` refuses.
        """
        if isinstance(spec, TokenTree):
            return spec
        if isinstance(spec, str):
            match = _FAMILY.fullmatch(spec.strip())
            if match is None:
                raise ValueError(f"{spec!r} is not a tree, allowed: {FAMILIES}, {LISTS}")
            family, numbers = match[1], [int(n) for n in match[2].split(":")[1:]]
            builders = {
                ("binary", 1): lambda depth: cls.complete(2, depth),
                ("kary", 2): cls.complete,
                ("chain", 1): cls.chain,
                ("caterpillar", 1): cls.caterpillar,
                ("caterpillar", 2): cls.caterpillar,
            }
            build = builders.get((family, len(numbers)))
            if build is None or min(numbers) < 1:
                raise ValueError(f"{spec!r} is not a tree, allowed: {FAMILIES} (numbers from 1)")
            return build(*numbers)
        if isinstance(spec, Sequence):
            parents = [parent for parent in spec if type(parent) is int]
            if len(parents) == len(spec):
                return cls(tuple(parents))
            if any(isinstance(path, list | tuple) for path in spec):
                return cls.from_paths(spec)
        raise ValueError(f"{spec!r} is not a tree, allowed: {FAMILIES}, {LISTS}")

    @classmethod
    def from_paths(cls, paths: Sequence[object]) -> "TokenTree":
        """A tree from a list with one path for each drafted node, in any order, as Medusa and EAGLE
        describe trees: the indices of the children from the root to the node, best child first.

        Raises:
            ValueError: names the first entry that is no path, or whose parent or better sibling is
                missing; or anything the constructor refuses.

        Examples::

            >>> TokenTree.from_paths([[0], [1], [0, 0]]).parents
            (0, 0, 1)
        """
        places: dict[tuple[int, ...], int] = {}
        for place, path in enumerate(paths):
            if (
                not isinstance(path, list | tuple)
                or not path
                or any(type(child) is not int or child < 0 for child in path)
            ):
                raise ValueError(
                    f"paths[{place}] = {path!r} is no path: a list of child indices from 0"
                )
            if places.setdefault(tuple(path), place) != place:
                raise ValueError(f"paths[{place}] = {path!r} is there twice")
        # breadth-first, and siblings by their indices
        nodes = sorted(places, key=lambda path: (len(path), path))
        numbers = {(): 0} | {path: number for number, path in enumerate(nodes, start=1)}
        for path, place in places.items():
            *above, last = path
            for needed in (tuple(above), *([(*above, last - 1)] if last else ())):
                if needed not in numbers:
                    raise ValueError(
                        f"paths[{place}] = {list(path)} needs {list(needed)}, which is not there"
                    )
        return cls(tuple(numbers[path[:-1]] for path in nodes))

    @property
    def num_nodes(self) -> int:
        """The number of drafted nodes, without the root."""
        return len(self.parents)

    @property
    def max_children(self) -> int:
        return int(self.num_children.max())

    @cached_property
    def depths(self) -> np.ndarray:
        """The depth of every node, root first. [num_nodes + 1] int32"""
        depths = np.zeros(self.num_nodes + 1, dtype=np.int32)
        for node, parent in enumerate(self.parents, start=1):
            depths[node] = depths[parent] + 1
        return depths

    @cached_property
    def level_sizes(self) -> tuple[int, ...]:
        """Nodes of every depth, the root's one first."""
        return tuple(np.bincount(self.depths).tolist())

    @cached_property
    def num_children(self) -> np.ndarray:
        """The number of children of every node, root first. [num_nodes + 1] int32"""
        return np.bincount(self.parents, minlength=self.num_nodes + 1).astype(np.int32)

    @cached_property
    def first_child(self) -> np.ndarray:
        """The number of every node's first child, 0 for a leaf. [num_nodes + 1] int32"""
        first = np.zeros(self.num_nodes + 1, dtype=np.int32)
        for node in range(self.num_nodes, 0, -1):
            first[self.parents[node - 1]] = node
        return first

    @cached_property
    def internal_nodes(self) -> np.ndarray:
        """The nodes that have children, in breadth-first order. [num_internal] int32"""
        return np.flatnonzero(self.num_children).astype(np.int32)

    @cached_property
    def ancestor_masks(self) -> np.ndarray:
        """Every node's ancestors and itself as bits: bit i is node i. [num_nodes + 1] int64"""
        masks = np.zeros(self.num_nodes + 1, dtype=np.uint64)
        masks[0] = 1
        for node, parent in enumerate(self.parents, start=1):
            masks[node] = masks[parent] | np.uint64(1 << node)
        return masks.view(np.int64)

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """Every node's path from the root, both ends included."""
        paths: list[tuple[int, ...]] = [(0,)]
        for node, parent in enumerate(self.parents, start=1):
            paths.append((*paths[parent], node))
        return tuple(paths)

    def __str__(self) -> str:
        branching = set(self.num_children[self.internal_nodes].tolist())
        if branching == {1}:
            return f"chain:{self.depth}"
        if branching == {2} and self.num_nodes == 2 ** (self.depth + 1) - 2:
            return f"binary:{self.depth}"
        return str(list(self.parents))
