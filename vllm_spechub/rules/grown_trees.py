# SPDX-License-Identifier: Apache-2.0
"""The trees that requests have drafted level by level: a topology for each of them."""

import torch

from vllm_spechub.trees.level_tree import LevelTree
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels.arguments import GrownTrees, TreeTables


def grown_trees(tree: LevelTree, num_rows: int, device: torch.device | str) -> GrownTrees:
    """Room for the trees of so many requests. Until one is drafted, a row holds any tree with
    these widths."""
    stand_in = tree.undrafted

    def rows(values, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        row = torch.as_tensor(values, dtype=dtype, device=device)
        return row.repeat(num_rows, 1)

    return GrownTrees(
        TreeTables(
            rows(stand_in.first_child),
            rows(stand_in.num_children),
            torch.as_tensor(tree.internal_index, device=device),
            rows([0, *stand_in.parents]),
        ),
        rows(stand_in.ancestor_masks, torch.int64),
        rows([1.0] * (tree.num_nodes + 1), torch.float32),
    )


def static_tree(trees: GrownTrees, row: int) -> TokenTree:
    """The tree in one row, as the static one that it is once it has been drafted."""
    return TokenTree(tuple(trees.tables.parents[row, 1:].tolist()))
