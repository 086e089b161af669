# SPDX-License-Identifier: Apache-2.0
"""Choose a tree for each number of requests, from measured step times and acceptance.

All times are relative to plain vLLM, which is measured beside each method. A method's gain is the
number of tokens that its steps emit, divided by their duration in plain steps.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import geometric_mean, median
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from vllm_spechub.measure.benchmark.interleaved import Row
from vllm_spechub.measure.benchmark.report import pooled_acceptance_length
from vllm_spechub.trees.best_tree import Rates, fastest_shape
from vllm_spechub.trees.tree import TokenTree, Tree

MARGIN = 0.02
"""Another choice replaces a range's tree only if it is faster by at least this share."""
DEEPEST = 10
"""The largest depth of a candidate tree."""


@dataclass(frozen=True)
class Curve:
    """One method at the batches at which it was measured."""

    # acceptance length, which does not depend on the batch
    tokens_per_step: float
    # by batch: duration of a step divided by that of a plain step
    step_time: Mapping[int, float]

    def gain(self, batch: int) -> float:
        """Predicted tokens/s divided by plain vLLM's; step times are interpolated linearly."""
        batches = sorted(self.step_time)
        times = [self.step_time[b] for b in batches]
        return self.tokens_per_step / float(np.interp(batch, batches, times))

    @property
    def mean_gain(self) -> float:
        """The geometric mean over the measured batches."""
        return geometric_mean([self.gain(batch) for batch in self.step_time])


def curve(rows: Sequence[Row]) -> Curve:
    """The curve of one method, from its measurements."""
    ordered = sorted(rows, key=lambda row: row.batch)
    return Curve(
        pooled_acceptance_length(rows),
        {
            batch: median(row.tokens_per_step / row.against_plain for row in found)
            for batch, found in groupby(ordered, key=lambda row: row.batch)
        },
    )


def chain_curves(rows: Sequence[Row], lengths: Sequence[int]) -> dict[int, Curve]:
    """The curves of vLLM's chains of all lengths up to the longest that was measured.

    A shorter chain drafts what a longer one drafts first, so all chains share the acceptance by
    depth. Each further token costs the same, so step times are interpolated linearly.

    Args:
        rows: measurements of all chains.
        lengths: the measured lengths, ascending.
    """
    by_length = {
        length: curve(found)
        for length in lengths
        if (found := [row for row in rows if row.method == f"chain {length}"])
    }
    if not by_length:
        return {}
    most = max(len(found.step_time) for found in by_length.values())
    measured = sorted(k for k, found in by_length.items() if len(found.step_time) == most)
    batches = by_length[measured[0]].step_time
    curves, emitted = {}, 1.0
    for length in range(1, measured[-1] + 1):
        deep = [row for row in rows if int(row.method.split()[-1]) >= length]
        accepted = sum(sum(row.accepted_by_depth[length - 1 : length]) for row in deep)
        emitted += accepted / sum(row.drafts for row in deep)
        times = {
            batch: float(
                np.interp(length, measured, [by_length[m].step_time[batch] for m in measured])
            )
            for batch in batches
        }
        curves[length] = Curve(emitted, times)
    return curves


def draft_costs(chains: Mapping[int, Curve]) -> dict[int, float]:
    """By batch: the duration of one more level of drafting and of verifying its node, in plain
    steps."""
    shortest, longest = chains[min(chains)], chains[max(chains)]
    levels = max(len(chains) - 1, 1)
    return {
        batch: max(longest.step_time[batch] - time, 0.0) / levels
        for batch, time in shortest.step_time.items()
    }


class Prices(NamedTuple):
    """What makes a step longer, in plain steps."""

    # of one more level of drafting
    level: float
    # of one more node to verify
    node: float


def measured_prices(
    trees: Mapping[str, TokenTree], curves: Mapping[str, Curve]
) -> dict[int, Prices]:
    """By batch: the prices that explain the measured steps of trees best, as a sum of a constant,
    the tree's levels and its nodes, none of which is negative.

    In a chain a level is always a node, too. Where nodes cost time, as they do while each reads
    experts of its own, levels alone are cheaper than chains tell.

    Returns:
        Nothing if there are too few trees to tell the prices apart.
    """
    measured = [(trees[name], found) for name, found in curves.items()]
    shapes = np.array([[1, tree.depth, tree.num_nodes] for tree, _ in measured], dtype=float)
    if not measured or np.linalg.matrix_rank(shapes) < shapes.shape[1]:
        return {}
    prices = {}
    for batch in measured[0][1].step_time:
        added = np.array([found.step_time[batch] - 1 for _, found in measured])
        (_, level, node), _ = nnls(shapes, added)
        prices[batch] = Prices(float(level), float(node))
    return prices


def candidate_trees(
    rates: Rates,
    node_counts: Sequence[int],
    costs: Sequence[float],
    tried: Collection[TokenTree] = (),
) -> list[TokenTree]:
    """For each number of nodes and cost of a level, the tree that emits the most tokens per second.

    A schedule needs trees with different numbers of nodes. If two different trees would have the
    same number, the later one gets fewer nodes.

    Args:
        rates: acceptance by number of children and slot.
        node_counts: largest numbers of drafted nodes.
        costs: durations of one level of drafting, in plain steps.
        tried: earlier candidates, which are not returned again.
    """
    trees = {tree.num_nodes: tree for tree in tried}
    for nodes in node_counts:
        for cost in costs:
            for limit in range(nodes, 0, -1):
                tree = fastest_shape(rates, limit, min(limit, DEEPEST), lambda _: 1.0, cost).tree
                if trees.setdefault(tree.num_nodes, tree) == tree:
                    break
    return [tree for tree in trees.values() if tree not in tried]


def distinct_sizes(trees: Mapping[str, Tree], curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Of the trees with the same number of nodes, which a schedule cannot hold both, the one with
    the highest mean gain over the measured batches."""
    ordered = sorted(curves, key=lambda name: curves[name].mean_gain)
    kept = {trees[name].num_nodes: name for name in ordered}
    return {name: found for name, found in curves.items() if name in kept.values()}


def choose(curves: Mapping[str, Curve], max_batch: int) -> list[tuple[int, int | None, str | None]]:
    """The fastest tree for each number of requests, as ranges.

    Args:
        curves: the curves of all trees, by name.
        max_batch: the largest batch that was measured; nothing is drafted beyond it.

    Returns:
        Ranges `(first, last, name)`, each beginning where the previous one ends. If `name` is
        None, nothing is drafted. The last range has no end: its `last` is None.
    """

    def gain(name: str | None, batch: int) -> float:
        return 1.0 if name is None else curves[name].gain(batch)

    kept: str | None = None
    chosen: list[str | None] = []
    for batch in range(1, max_batch + 1):
        best = max([None, *curves], key=lambda name: gain(name, batch))
        slower = gain(kept, batch) < 1.0  # than plain vLLM
        if slower or gain(best, batch) > (1 + MARGIN) * gain(kept, batch):
            # draft nothing unless a tree is clearly faster than plain vLLM
            kept = best if gain(best, batch) > 1 + MARGIN else None
        chosen.append(kept)
    chosen.append(None)
    ranges: list[tuple[int, int | None, str | None]] = []
    first = 1
    for name, run in groupby(chosen):
        length = len(list(run))
        ranges.append((first, first + length - 1, name))
        first += length
    first, _, name = ranges[-1]
    ranges[-1] = (first, None, name)
    return ranges
