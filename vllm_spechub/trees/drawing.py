# SPDX-License-Identifier: Apache-2.0
"""A tree as text, and where its nodes stand in a picture."""

from vllm_spechub.trees.tree import TokenTree, Tree


def draw(tree: TokenTree) -> str:
    """Draw the tree as text, one line per node, siblings in slot order.

    Examples::

        >>> print(draw(TokenTree((0, 0, 1))))
        0
        ├─ 1
        │  └─ 3
        └─ 2
    """
    lines = ["0"]

    def add_children(node: int, indent: str) -> None:
        first, count = int(tree.first_child[node]), int(tree.num_children[node])
        for child in range(first, first + count):
            last = child == first + count - 1
            lines.append(f"{indent}{'└─' if last else '├─'} {child}")
            add_children(child, indent + ("   " if last else "│  "))

    add_children(0, "")
    return "\n".join(lines)


def describe(tree: Tree) -> str:
    """The tree as text, one line per node; of trees that each step decides, their levels."""
    if isinstance(tree, TokenTree):
        return draw(tree)
    return "\n".join(f"depth {depth}: {size}" for depth, size in enumerate(tree.level_sizes))


def node_rows(tree: TokenTree) -> list[float]:
    """Every node's vertical place in a picture: leaves are in rows 0, 1, 2, ... in order, and a
    parent is halfway between its first and its last child. [num_nodes + 1]"""
    rows = [0.0] * (tree.num_nodes + 1)
    leaves = 0

    def place(node: int) -> float:
        nonlocal leaves
        first, count = int(tree.first_child[node]), int(tree.num_children[node])
        if count == 0:
            rows[node] = float(leaves)
            leaves += 1
        else:
            heights = [place(child) for child in range(first, first + count)]
            rows[node] = (heights[0] + heights[-1]) / 2
        return rows[node]

    place(0)
    return rows
