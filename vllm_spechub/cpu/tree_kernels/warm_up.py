# SPDX-License-Identifier: Apache-2.0
"""Compiles the Numba kernels, or loads them from its cache, before the first request needs them."""

import numpy as np
import torch

from vllm_spechub.cpu.tree_kernels.attention import store_and_attend
from vllm_spechub.cpu.tree_kernels.sampling import (
    sample_children,
    verify_tree,
    write_children,
)
from vllm_spechub.rules.draft_state import DraftBuffers
from vllm_spechub.trees.tree import TokenTree


def warm_up() -> None:
    tree = TokenTree.chain(1)
    tables = [torch.from_numpy(t) for t in (tree.first_child, tree.num_children)]
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    logits = torch.zeros(1, 8)
    (state,) = DraftBuffers([tree], 1, 8, torch.float32, torch.device("cpu")).states
    for rule in ("ordered", "traversal"):
        children = sample_children(
            logits, one, zero, zero, zero, zero, zero + 1, rule=rule, max_children=1
        )
        write_children(state, state.levels[0], zero, logits, *children)
        verify_tree(
            logits.expand(2, -1),
            zero,
            zero + 1,
            torch.zeros(2, dtype=torch.int64),
            logits.view(1, 1, -1),
            torch.zeros(1, 1, dtype=torch.int32),
            zero,
            one,
            one,
            zero,
            zero,
            *tables,
            torch.from_numpy(tree.internal_index),
            torch.from_numpy(tree.subtree_sizes),
            max_depth=1,
            rule=rule,
        )
    query = np.zeros((1, 1, 4), np.float32)
    count = np.ones(1, np.int64)
    store_and_attend(
        query,
        query,
        count - 1,
        query,
        np.zeros((1, 1, 2, 4, 16), np.float32),
        np.zeros((1, 1, 2, 16, 4), np.float32),
        np.zeros((1, 1), np.int32),
        np.ones(1, np.int32),
        count - 1,
        count,
        np.zeros(1, np.int32),
        count,
        np.float32(1.0),
        np.float32(0.0),
        0,
        query.copy(),
    )
