# SPDX-License-Identifier: Apache-2.0
"""The best shape for given rates, against all trees of a small size; "auto" in configurations."""

import itertools
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_spechub.trees.best_tree import best_shape, expected_accepted, parse_tree, shipped_rates
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
    """The last slot is the best one here, so the larger subtree hangs from it."""
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


@pytest.mark.parametrize("rule", RULES)
def test_auto_for_every_rule(rule):
    rates = shipped_rates(rule)
    assert list(rates) == ([1] if rule == "chain" else [1, 2, 3, 4])
    for spec, nodes, depth in (("auto", 15, 5), ("auto:31", 31, 5), ("auto:7:3", 7, 3)):
        tree = parse_tree(spec, rule)
        assert tree.depth <= depth
        assert tree.num_nodes == (depth if rule == "chain" else nodes)
        assert tree == best_shape(rates, nodes, depth).tree
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
            r"binary:DEPTH.*auto\[:NODES\[:DEPTH\]\], or a list",
        ),
        ("automatic", "ordered", "is none of"),
        ("auto", "mine", "no acceptance rates for verification 'mine', only for .*rrsw"),
        ([0, 2], "ordered", r"parents\[1\] = 2"),
    ],
)
def test_bad_specs(spec, rule, message):
    with pytest.raises(ValueError, match=message):
        parse_tree(spec, rule)
