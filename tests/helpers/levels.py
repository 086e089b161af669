# SPDX-License-Identifier: Apache-2.0
"""Trees that are grown level by level, without models."""

import random
from collections.abc import Callable

import torch

from vllm_spechub.rules.grown_trees import grown_trees, static_tree
from vllm_spechub.trees.level_tree import LevelTree
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels.arguments import GrownTrees, Requests

__all__ = ["allocated", "grown_as", "grown_trees", "random_logits", "random_tree", "static_tree"]


def random_logits(num_rows: int, vocab_size: int, seed: int, device, odd: bool = False):
    """Rows of different sharpness, if `odd` some masked, tied or certain."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size, generator=generator)
    logits *= 0.5 + 4.0 * torch.rand(num_rows, 1, generator=generator)
    if odd:
        logits[::5] = 0.0
        logits[1::5, 3:] = -torch.inf
        logits[2::5] = -torch.inf
        logits[3::5, 7] = 200.0
    return logits.to(device)


def allocated(
    tree: LevelTree,
    requests: Requests,
    rule: str,
    allocate: Callable[..., None],
    *,
    seed: int,
    vocab_size: int,
    device,
    odd: bool = False,
) -> GrownTrees:
    """What a function makes of random rows, level by level."""
    trees = grown_trees(tree, len(requests.temperature), device)
    for depth, nodes in enumerate(tree.internal_levels()):
        num_rows = len(requests.req_idx) * len(nodes)
        allocate(
            random_logits(num_rows, vocab_size, seed + depth, device, odd),
            requests,
            trees,
            first_node=int(nodes[0]),
            width=len(nodes),
            width_below=tree.widths[depth],
            rule=rule,
        )
    return trees


def random_tree(tree: LevelTree, source: random.Random) -> TokenTree:
    """Any tree with these widths."""
    parents: list[int] = []
    first, above = 0, 1
    for width in tree.widths:
        slots = [node for node in range(first, first + above) for _ in range(4)]
        parents += sorted(source.sample(slots, width))
        first, above = first + above, width
    return TokenTree(tuple(parents))


def grown_as(tree: LevelTree, trees: list[TokenTree]) -> GrownTrees:
    """Rows that hold these trees."""
    grown = grown_trees(tree, len(trees), "cpu")
    for row, static in enumerate(trees):
        assert static.level_sizes == tree.level_sizes
        grown.tables.first_child[row] = torch.from_numpy(static.first_child)
        grown.tables.num_children[row] = torch.from_numpy(static.num_children)
        grown.tables.parents[row, 1:] = torch.tensor(static.parents)
        grown.ancestor_masks[row] = torch.from_numpy(static.ancestor_masks)
    return grown
