# SPDX-License-Identifier: Apache-2.0
"""The best shape for given rates, against all trees of a small size; "auto" in configurations."""

import itertools
import json
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_spechub.trees import best_tree
from vllm_spechub.trees.best_tree import best_shape, fastest_shape, parse_tree, shipped_rates
from vllm_spechub.trees.expert_cost import (
    experts_read,
    schedule_for_experts,
    step_cost,
    tokens_per_step,
)
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES

RULES = tuple(BUILTIN_RULES)


@lru_cache
def nested_trees(size: int, depth: int) -> list[tuple]:
    """All ordered trees of exactly `size` drafted nodes, at most 4 children each."""
    if size == 0:
        return [()]
    if depth == 0:
        return []
    return [
        children
        for count in range(1, min(4, size) + 1)
        for sizes in itertools.product(range(size), repeat=count)
        if sum(sizes) + count == size
        for children in itertools.product(*(nested_trees(s, depth - 1) for s in sizes))
    ]


def breadth_first(children: tuple) -> TokenTree:
    parents, level = [], [(0, children)]
    while level:
        following = []
        for number, below in level:
            for child in below:
                parents.append(number)
                following.append((len(parents), child))
        level = following
    return TokenTree(tuple(parents))


def expected_accepted(tree: TokenTree, rates: dict) -> float:
    """What `best_shape` maximises."""
    reach = [1.0] * (tree.num_nodes + 1)
    for node, parent in enumerate(tree.parents, start=1):
        slot = node - int(tree.first_child[parent])
        reach[node] = reach[parent] * rates[int(tree.num_children[parent])][slot]
    return sum(reach[1:])


def most_accepted(rates: dict, max_nodes: int, max_depth: int) -> float:
    """The largest `expected_accepted`, by recursion over a node's descendants and slots."""

    @lru_cache(None)
    def node(descendants: int, depth: int) -> float:
        if descendants == 0 or depth == 0:
            return 0.0
        counts = [k for k in rates if k <= descendants]
        return max(slots(k, 0, descendants, depth) for k in counts)

    @lru_cache(None)
    def slots(k: int, slot: int, left: int, depth: int) -> float:
        if slot == k:
            return 0.0
        return max(
            rates[k][slot] * (1 + node(size - 1, depth - 1))
            + slots(k, slot + 1, left - size, depth)
            for size in range(1, left - (k - slot - 1) + 1)
        )

    return node(max_nodes, max_depth)


rate = st.floats(0.01, 0.5)
tables = st.fixed_dictionaries({k: st.lists(rate, min_size=k, max_size=k) for k in (1, 2, 3, 4)})


@settings(max_examples=25, deadline=None)
@given(tables, st.integers(1, 6), st.integers(1, 4))
def test_no_tree_is_better(rates, max_nodes, max_depth):
    found = best_shape(rates, max_nodes, max_depth)
    assert found.tree.num_nodes <= max_nodes
    assert found.tree.depth <= max_depth
    assert found.accepted == pytest.approx(expected_accepted(found.tree, rates))
    best = max(
        expected_accepted(breadth_first(nested), rates)
        for size in range(1, max_nodes + 1)
        for nested in nested_trees(size, max_depth)
    )
    assert found.accepted == pytest.approx(best)


def test_slots_take_subtrees_by_their_rates():
    """The last slot is the best one here, so its child gets the larger subtree."""
    tree = best_shape({1: [0.5], 2: [0.2, 0.7]}, max_nodes=4, max_depth=4).tree
    assert tree.num_children[1] == 0
    assert tree.num_children[2] == 2


def test_no_larger_than_it_needs_to_be():
    assert best_shape({1: [0.5]}, max_nodes=20, max_depth=4).tree == TokenTree.chain(4)
    assert best_shape({1: [0.5], 2: [0.5, 0.0]}, 20, 4).tree == TokenTree.chain(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({1: [0.5]}, 64, 3), r"max_nodes must be in 1\.\.63"),
        (({1: [0.5]}, 5, 0), r"max_depth must be in 1\.\.63"),
        (({}, 5, 3), "rates must hold"),
        (({2: [0.5]}, 5, 3), "rates must hold"),
        (({1: [1.5]}, 5, 3), "rates must hold"),
        (({1: [0.0]}, 5, 3), "rates are all 0"),
    ],
)
def test_bad_shapes(arguments, message):
    with pytest.raises(ValueError, match=message):
        best_shape(*arguments)


def file_rates(rule: str) -> dict[int, list[float]]:
    """A rule's rates as the file has them, averaged over temperatures."""
    tables = json.loads(Path(best_tree.__file__).with_name("rates.json").read_text())["rates"][rule]
    by_count = ({int(k): slots for k, slots in table.items()} for table in tables.values())
    pooled: dict[int, list[list[float]]] = {}
    for table in by_count:
        for k, slots in table.items():
            pooled.setdefault(k, []).append(slots)
    return {
        k: [sum(rates) / len(rates) for rates in zip(*tables, strict=True)]
        for k, tables in pooled.items()
    }


# docs/library.md says that `traversal` takes `ordered`'s rates
TRAVERSAL_TREES = {
    ("auto", 15): (0, 0, 1, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 13),
    ("auto:31", 31): (
        *(0, 0, 0, 0, 1, 1, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10),
        *(11, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 23, 24),
    ),
}


@pytest.mark.parametrize(("spec", "nodes"), TRAVERSAL_TREES)
def test_traversal_takes_the_trees_of_ordered(spec, nodes):
    tree = TokenTree(TRAVERSAL_TREES[spec, nodes])
    assert parse_tree(spec, "traversal") == parse_tree(spec, "ordered") == tree
    most = most_accepted(file_rates("ordered"), nodes, 5)
    assert expected_accepted(tree, file_rates("ordered")) == pytest.approx(most, abs=1e-9)
    if nodes == 31:  # its own rates would give another
        own = most_accepted(file_rates("traversal"), nodes, 5)
        assert expected_accepted(tree, file_rates("traversal")) < own - 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_auto_for_every_rule(rule):
    rates = shipped_rates(rule)
    assert list(rates) == ([1] if rule == "chain" else [1, 2, 3, 4])
    for spec, nodes, depth in (("auto", 15, 5), ("auto:31", 31, 5), ("auto:7:3", 7, 3)):
        tree = parse_tree(spec, rule)
        assert tree.depth <= depth
        assert tree.num_nodes == (depth if rule == "chain" else nodes)
        by_file = file_rates("ordered" if rule == "traversal" else rule)
        most = most_accepted(by_file, nodes, depth)
        assert expected_accepted(tree, by_file) == pytest.approx(most, abs=1e-9)
        # as `vllm-spechub shape` prints it
        assert parse_tree(list(tree.parents), rule) == tree


def test_auto_of_a_few_nodes():
    assert parse_tree("auto:1", "ordered") == TokenTree.chain(1)
    assert parse_tree(" auto:3 ", "rrs").num_nodes == 3


@pytest.mark.parametrize(
    ("spec", "rule", "message"),
    [
        ("auto:64", "ordered", r"NODES and DEPTH must be in 1\.\.63"),
        ("auto:0", "ordered", r"NODES and DEPTH must be in 1\.\.63"),
        ("auto:15:0", "ordered", r"NODES and DEPTH must be in 1\.\.63"),
        (
            "auto:15:5:2",
            "ordered",
            r"binary:DEPTH.*auto\[:NODES\[:DEPTH\]\], a list",
        ),
        ("automatic", "ordered", "is not a tree, allowed: "),
        ("auto", "mine", "no acceptance rates for verification 'mine', only for .*rrsw"),
        ([0, 2], "ordered", r"parents\[1\] = 2"),
    ],
)
def test_bad_specs(spec, rule, message):
    with pytest.raises(ValueError, match=message):
        parse_tree(spec, rule)


def test_the_fastest_tree_at_given_costs():
    rates = shipped_rates("traversal")
    free = fastest_shape(rates, 15, 5, lambda rows: 1.0, 0.0)
    assert free == best_shape(rates, 15, 5)
    assert fastest_shape(rates, 15, 5, lambda rows: 1.0, 0.5).tree.depth < free.tree.depth
    # as on a mixture of experts with one request: every row costs nearly as much as the first
    few = fastest_shape(rates, 15, 5, lambda rows: 0.4 + 0.6 * rows, 0.0)
    assert few.tree.num_nodes == 1
    # once all experts are read, further nodes are free
    full = fastest_shape(rates, 15, 5, lambda rows: min(1 + rows, 4.0), 0.0)
    assert full.tree.num_nodes == 15


@settings(max_examples=20, deadline=None)
@given(tables, st.integers(1, 6), st.floats(0, 1))
def test_no_tree_is_faster(rates, nodes, cost):
    """Against the best trees of every size and depth."""

    def speed(shape):
        return (1 + shape.accepted) / (1 + cost * shape.tree.num_nodes + 0.1 * shape.tree.depth)

    found = fastest_shape(rates, nodes, nodes, lambda rows: 1 + cost * (rows - 1), 0.1)
    all_best = [best_shape(rates, n, d) for n in range(1, nodes + 1) for d in range(1, n + 1)]
    assert speed(found) == pytest.approx(max(map(speed, all_best)))
    assert tokens_per_step(found.tree, rates) == pytest.approx(1 + found.accepted)


def test_what_rows_of_a_mixture_of_experts_read():
    # by hand: two rows that choose 1 of 2 experts choose the same one in half of all cases
    assert experts_read(2, 1, 2) == pytest.approx(1.5)
    assert [experts_read(8, 2, rows) for rows in (1, 10_000)] == pytest.approx([2, 8])
    assert step_cost(8, 2, 1) == pytest.approx(1)
    # reading everything once, then arithmetic
    assert step_cost(8, 2, 100) == pytest.approx(0.25 + 0.75 * 4)
    assert step_cost(8, 2, 1500) == pytest.approx(10)


def test_the_schedule_for_experts_begins_with_nothing():
    rates = shipped_rates("traversal")
    trees = [TokenTree.parse(spec) for spec in ("binary:3", "chain:2")]
    begins = []
    for experts, chosen in ((8, 2), (128, 8), (256, 8)):
        ranges = schedule_for_experts(experts, chosen, trees, rates)
        assert [tree for *_, tree in ranges] == [None, *trees, None]
        assert [first for first, *_ in ranges[1:]] == [last + 1 for _, last, _ in ranges[:-1]]
        assert ranges[-1][1] is None
        begins.append(ranges[1][0])
    assert begins == sorted(begins)  # the sparser, the later
