# SPDX-License-Identifier: Apache-2.0
"""The best tree within a number of nodes and a depth, by dynamic programming over slots.

The idea is Sequoia's (Chen et al., 2024, arXiv 2402.12374): given the rate at which the child in
each slot is accepted, a subtree's expected number of accepted tokens is a sum over its slots. Here
the rates also depend on how many siblings there are, as SpecHub's do.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Any, NamedTuple

from vllm_spechub.trees.level_tree import LEVELS, LEVELS_FORM, LevelTree, Measured
from vllm_spechub.trees.tree import FAMILIES, MAX_NODES, TokenTree
from vllm_spechub.triton_kernels.constants import MAX_CHILDREN
from vllm_spechub.triton_kernels.rules import rates_of

Rates = Mapping[int, Sequence[float]]
"""For each number of children, the acceptance rate of each slot."""

AUTO_NODES = 15
AUTO_DEPTH = 5
AUTO_FORM = "auto[:NODES[:DEPTH]]"
SHIPPED = "rates.json"
_AUTO = re.compile(r"auto(?::(\d+)(?::(\d+))?)?")


class Shape(NamedTuple):
    """A tree, and how many of its tokens we expect to be accepted."""

    tree: TokenTree
    # accepted tokens per step, the bonus token not counted
    accepted: float


class _Node(NamedTuple):
    """A subtree while the best one is searched for."""

    # expected accepted tokens below the node
    value: float
    # subtrees, in slot order
    children: tuple["_Node", ...] = ()


def best_shape(rates: Rates, max_nodes: int, max_depth: int) -> Shape:
    """Find the tree with the most expected accepted tokens, if acceptance depends only on a node's
    number of children and the child's slot.

    Args:
        rates: `rates[k][slot]`, the probability that a node with k children accepts the child in
            that slot; k may be missing, and then no node gets k children.
        max_nodes: drafted nodes, 1 to 63.
        max_depth: deepest level, from 1; each level costs a draft pass.

    Returns:
        The tree, without nodes that add nothing, and its expected accepted tokens.

    Raises:
        ValueError: names the argument.

    Examples::

        >>> best_shape({1: [0.7], 2: [0.7, 0.2]}, max_nodes=4, max_depth=3).tree.parents
        (0, 0, 1, 3)
    """
    *_, of_all_levels = _best_nodes(rates, max_nodes, max_depth)
    return _shape(of_all_levels[max_nodes])


def fastest_shape(
    rates: Rates,
    max_nodes: int,
    max_depth: int,
    step_cost: Callable[[int], float],
    level_cost: float,
) -> Shape:
    """Find the tree that emits the most tokens per unit of time.

    Args:
        rates: as `best_shape` takes them.
        max_nodes: drafted nodes, 1 to 63.
        max_depth: deepest level, from 1.
        step_cost: the duration of a step of the target by its number of rows, which are the root
            and the nodes. If a further node costs nothing, there are `max_nodes`.
        level_cost: the duration of drafting one level.

    Raises:
        ValueError: names the argument.
    """
    shapes = [
        _shape(nodes[count])
        for nodes in _best_nodes(rates, max_nodes, max_depth)
        for count in range(1, max_nodes + 1)
        if nodes[count].children or count == max_nodes
    ]

    def rate(shape: Shape) -> float:
        duration = step_cost(1 + shape.tree.num_nodes) + level_cost * shape.tree.depth
        return (1 + shape.accepted) / duration

    return max(shapes, key=rate)


def _best_nodes(rates: Rates, max_nodes: int, max_depth: int) -> Iterator[list[_Node]]:
    """By dynamic programming, for each largest depth from 1 on: the best node with at most n
    descendants, n from 0 to `max_nodes`."""
    _check(rates, max_nodes, max_depth)
    leaf = _Node(0.0)
    # below[n]: the best node with at most n descendants, within the levels left
    below = [leaf] * (max_nodes + 1)
    for _ in range(max_depth):
        best = [leaf] * (max_nodes + 1)
        for slots in rates.values():
            # forest[n]: the best subtrees for the slots so far, of exactly n nodes together
            forest: list[_Node | None] = [leaf] + [None] * max_nodes
            for rate in slots:
                longer: list[_Node | None] = [None] * (max_nodes + 1)
                for used, before in enumerate(forest):
                    if before is None:
                        continue
                    for size in range(1, max_nodes - used + 1):
                        child = below[size - 1]
                        value = before.value + rate * (1 + child.value)
                        kept = longer[used + size]
                        if kept is None or value > kept.value + 1e-12:
                            longer[used + size] = _Node(value, (*before.children, child))
                forest = longer
            for n, node in enumerate(forest):
                if node is not None and node.value > best[n].value + 1e-12:
                    best[n] = node
        for n in range(1, max_nodes + 1):  # at most n nodes, and fewer where those do as well
            if best[n - 1].value >= best[n].value - 1e-12:
                best[n] = best[n - 1]
        below = best
        yield below


def _shape(root: _Node) -> Shape:
    """The tree below a node that a search has found."""
    if not root.children:
        raise ValueError("rates are all 0: no draft is ever accepted")
    parents: list[int] = []
    level = [(0, root)]
    while level:
        following = []
        for number, node in level:
            for child in node.children:
                parents.append(number)
                following.append((len(parents), child))
        level = following
    return Shape(TokenTree(tuple(parents)), root.value)


def _check(rates: Rates, max_nodes: int, max_depth: int) -> None:
    """Raise `best_shape`'s ValueError if an argument is out of range."""
    if not 1 <= max_nodes <= MAX_NODES:
        raise ValueError(f"max_nodes must be in 1..{MAX_NODES}, got {max_nodes}")
    if not 1 <= max_depth <= MAX_NODES:
        raise ValueError(f"max_depth must be in 1..{MAX_NODES}, got {max_depth}")
    if not rates or any(
        not 1 <= k <= MAX_CHILDREN or len(slots) != k or not all(0 <= r <= 1 for r in slots)
        for k, slots in rates.items()
    ):
        raise ValueError(
            f"rates must hold k acceptance rates in 0..1 for each k in 1..{MAX_CHILDREN}"
        )


def shipped_rates(rule: str) -> dict[int, list[float]]:
    """The acceptance rates from which a rule's "auto" trees are built, measured on the demo pair.

    They are means over the measured temperatures, and belong to the rule itself or to the rule
    that `rates_of` names instead.

    Returns:
        For each number of children, the acceptance rate of each slot.

    Raises:
        ValueError: no rates are shipped for this rule.
    """
    by_rule = _shipped()["rates"]
    source = rates_of(rule)
    if source not in by_rule:
        raise ValueError(
            f"'auto' has no acceptance rates for verification {rule!r}, only for "
            f"{', '.join(by_rule)}; measure a shape with `vllm-spechub shape`"
        )
    tables = [
        {int(k): by_slot for k, by_slot in table.items()} for table in by_rule[source].values()
    ]
    return average_rates(tables)


def average_rates(tables: Sequence[Rates]) -> dict[int, list[float]]:
    """The mean of several tables of rates, which have the same numbers of children."""
    return {
        k: [sum(rates) / len(tables) for rates in zip(*(t[k] for t in tables), strict=True)]
        for k in tables[0]
    }


@lru_cache(maxsize=1)
def _shipped() -> dict[str, Any]:
    return json.loads(files("vllm_spechub.trees").joinpath(SHIPPED).read_text(encoding="utf-8"))


def parse_tree(
    spec: str | Sequence[object] | TokenTree | LevelTree,
    rule: str,
    measured: Measured | None = None,
) -> TokenTree | LevelTree:
    """Parse a tree's configuration: whatever `TokenTree.parse` takes, "auto", or level widths.

    Args:
        spec: "auto", "auto:NODES" or "auto:NODES:DEPTH" for the best tree of at most that many
            drafted nodes and levels by the shipped rates; "levels:WIDTH,WIDTH,..." for the widths
            of the levels of trees that each step decides; otherwise as in `TokenTree.parse`.
        rule: the verification rule that "auto" is for.
        measured: finds the widths that "levels:auto" stands for; None where there is no pair of
            models.

    Raises:
        ValueError: not a tree, "auto" out of range, or no widths were measured.
    """
    if isinstance(spec, LevelTree):
        return spec
    if isinstance(spec, str) and spec.strip().startswith(LEVELS):
        return LevelTree.parse(spec, measured)
    match = _AUTO.fullmatch(spec.strip()) if isinstance(spec, str) else None
    if match is None:
        try:
            return TokenTree.parse(spec)
        except ValueError as error:
            message = str(error).replace(FAMILIES, f"{FAMILIES}, {AUTO_FORM}, {LEVELS_FORM}")
            raise ValueError(message) from None
    nodes = int(match[1] or AUTO_NODES)
    depth = int(match[2] or min(AUTO_DEPTH, nodes))
    if not (1 <= nodes <= MAX_NODES and 1 <= depth <= MAX_NODES):
        raise ValueError(f"{spec!r}: NODES and DEPTH must be in 1..{MAX_NODES}")
    return best_shape(shipped_rates(rule), nodes, depth).tree
