# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_spechub.trees.tree import MAX_NODES, TokenTree


@st.composite
def trees(draw):
    """Random breadth-first trees of up to 20 nodes, at most 4 children each."""
    parents, node = [], 0
    budget = draw(st.integers(1, 20))
    while len(parents) < budget and node <= len(parents):
        least = 1 if node == len(parents) else 0  # someone has to go on
        count = draw(st.integers(least, min(4, budget - len(parents))))
        parents += [node] * count
        node += 1
    return TokenTree(tuple(parents))


@given(trees())
def test_tables_agree_with_parents(tree):
    for node, parent in enumerate(tree.parents, start=1):
        assert tree.depths[node] == tree.depths[parent] + 1
        first = tree.first_child[parent]
        assert first <= node < first + tree.num_children[parent]
        assert tree.paths[node] == (*tree.paths[parent], node)
    for node, mask in enumerate(tree.ancestor_masks.view(np.uint64).tolist()):
        assert {i for i in range(64) if mask >> i & 1} == set(tree.paths[node])
    internal = np.concatenate(tree.internal_levels())
    assert internal.tolist() == tree.internal_nodes.tolist()
    assert tree.internal_index[internal].tolist() == list(range(len(internal)))
    assert TokenTree.parse(list(tree.parents)) == tree


@pytest.mark.parametrize(
    ("spec", "num_nodes", "depth"),
    [
        ("binary:3", 14, 3),
        ("binary:5", 62, 5),
        ("kary:4:2", 20, 2),
        ("chain:7", 7, 7),
        ("caterpillar:5", 10, 5),
        ("caterpillar:5:3", 15, 5),
        ([0, 0, 1, 2, 2], 5, 2),
    ],
)
def test_parse(spec, num_nodes, depth):
    tree = TokenTree.parse(spec)
    assert (tree.num_nodes, tree.depth) == (num_nodes, depth)


def test_bit_63_of_the_widest_tree():
    tree = TokenTree.chain(MAX_NODES)
    assert tree.ancestor_masks[-1] == -1  # all 64 bits


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("binary:6", "1 to 63 drafted nodes"),
        ("chain:64", "1 to 63 drafted nodes"),
        ("kary:5:1", "at most 4"),
        ("kary:2", "is not a tree, allowed: "),
        ("binary:0", "is not a tree, allowed: "),
        ("spruce:3", "binary:DEPTH"),
        ([], "1 to 63"),
        ([0, 1, 0], "breadth-first"),
        ([1], "parent in 0..0"),
        ([0, -1], "parent in 0..1"),
        ([0, 0, 0, 0, 0], "at most 4"),
        ([0.0], "list of parents"),
        (3, "list of parents"),
    ],
)
def test_bad_trees_say_what_is_allowed(spec, message):
    with pytest.raises(ValueError, match=message):
        TokenTree.parse(spec)


def test_str_is_readable():
    assert str(TokenTree.parse("binary:3")) == "binary:3"
    assert str(TokenTree.parse("chain:4")) == "chain:4"
    assert str(TokenTree((0, 0, 1))) == "[0, 0, 1]"


def test_lists_of_paths():
    """As Medusa and EAGLE give them: in any order, best child first."""
    paths = [[1], [0, 0], [0], [0, 1], [1, 0], [2], [0, 0, 0]]
    tree = TokenTree.parse(paths)
    assert tree == TokenTree((0, 0, 0, 1, 1, 2, 4))
    assert tree == TokenTree.from_paths([tuple(path) for path in reversed(paths)])
    # and back: every node's slots among its siblings
    slots = np.arange(1, tree.num_nodes + 1) - tree.first_child[list(tree.parents)]
    found = [[int(slots[node - 1]) for node in path[1:]] for path in tree.paths[1:]]
    assert found == sorted(paths, key=lambda path: (len(path), path))


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([[0], [0, 0, 0]], r"paths\[1\] = \[0, 0, 0\] needs \[0, 0\], which is not there"),
        ([[0], [2]], r"paths\[1\] = \[2\] needs \[1\], which is not there"),
        ([[1]], r"paths\[0\] = \[1\] needs \[0\], which"),
        ([[0], [1], [0, 1]], r"paths\[2\] = \[0, 1\] needs \[0, 0\]"),
        ([[0], [1], (0,)], r"paths\[2\] = \(0,\) is there twice"),
        ([[0], []], r"paths\[1\] = \[\] is no path"),
        ([[0], 1], r"paths\[1\] = 1 is no path"),
        ([[0], [0.0]], r"paths\[1\] = \[0.0\] is no path"),
        ([[0], [-1]], r"paths\[1\] = \[-1\] is no path"),
        ([[0], [True]], r"paths\[1\] = \[True\] is no path"),
        ([[i] for i in range(9)], "node 0 has 9 children, at most 4 allowed"),
    ],
)
def test_lists_of_paths_that_are_no_tree(paths, message):
    with pytest.raises(ValueError, match=message):
        TokenTree.parse(paths)


def test_paths_in_the_place_of_parents():
    for parents in ([(0,), (0, 0)], [0, 0.0], ["0"]):
        with pytest.raises(ValueError, match=r"parents\[\d\] = .* is no node's number"):
            TokenTree(parents)
