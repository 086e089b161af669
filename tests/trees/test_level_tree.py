# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from vllm_spechub.trees.best_tree import parse_tree
from vllm_spechub.trees.level_tree import LevelTree, width_candidates
from vllm_spechub.trees.schedule import TreeSchedule
from vllm_spechub.trees.tree import MAX_NODES, TokenTree

TREES = [LevelTree(widths) for widths in ((1,), (4, 16, 43), (3, 4, 4, 3), (2, 1, 4))]


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_what_is_known_before_a_tree_is_drafted(tree):
    """Is what is known of any tree that may be drafted."""
    some = tree.undrafted
    assert some.level_sizes == tree.level_sizes
    assert some.num_nodes == tree.num_nodes
    assert some.depth == tree.depth
    assert np.array_equal(some.depths, tree.depths)
    # a static tree's internal nodes have children, here all nodes above the last level may
    assert set(some.internal_nodes) <= set(tree.internal_nodes)
    assert [len(level) for level in tree.internal_levels()] == [1, *tree.widths[:-1]]
    assert tree.internal_index.tolist().count(-1) == tree.widths[-1]
    assert some.max_children <= tree.max_children
    assert parse_tree(str(tree), "mixed") == tree
    assert parse_tree(tree, "mixed") is tree
    assert tree != some


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("levels:", "is not a tree, allowed: levels:WIDTH"),
        ("levels:3;4", "is not a tree, allowed: levels:WIDTH"),
        ("levels:0", "every width must be at least 1"),
        ("levels:5", "a level of 5 below one of 1 needs more than 4 children per node"),
        ("levels:2,9", "a level of 9 below one of 2 needs more than 4 children per node"),
        ("levels:4,16,44", "a tree has 1 to 63 drafted nodes, got 64"),
        ("levels:auto:64", "NODES must be in 1..63"),
        ("levels:auto:3:4", "DEPTH in 1..NODES"),
    ],
)
def test_widths_that_make_no_tree(spec, message):
    with pytest.raises(ValueError) as error:
        parse_tree(spec, "mixed")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_candidates_use_the_nodes():
    for nodes in range(1, MAX_NODES + 1):
        for depth in range(1, nodes + 1):
            for tree in width_candidates(nodes, depth):
                assert tree.num_nodes <= nodes
                assert tree.depth == depth
            if 4 * depth >= nodes >= 3 * depth > 3:
                assert max(tree.num_nodes for tree in width_candidates(nodes, depth)) == nodes
    assert LevelTree((4, 9, 8, 9)) in width_candidates(30, 4)
    # and the levels of static trees
    static = [TokenTree((0, 0, 1, 1, 2, 3)), TokenTree.chain(2)]
    candidates = width_candidates(6, 3, static)
    assert candidates[:2] == [LevelTree((2, 3, 1)), LevelTree((1, 1))]
    assert all(tree.depth == 3 for tree in candidates[2:])


def test_auto_is_what_was_measured():
    asked = []

    def measured(nodes, depth):
        asked.append((nodes, depth))
        return TREES[2]

    assert parse_tree("levels:auto", "mixed", measured) == TREES[2]
    assert parse_tree("levels:auto:3", "mixed", measured) == TREES[2]
    schedule = [[1, 2, "levels:auto:31:6"], [3, None, None]]
    assert TreeSchedule.parse(schedule, "mixed", measured).trees == (TREES[2],)
    assert asked == [(15, 5), (3, 3), (31, 6)]
    with pytest.raises(ValueError, match="measured for a pair of models, and there is none"):
        parse_tree("levels:auto", "mixed")


def test_a_drafted_tree_is_a_static_one():
    assert isinstance(TREES[0].undrafted, TokenTree)
