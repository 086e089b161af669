# SPDX-License-Identifier: Apache-2.0
"""Compiles the Numba kernels, or loads them from its cache, before the first request needs them."""

import numpy as np
import torch

from vllm_spechub.cpu.tree_kernels.allocation import allocate_children
from vllm_spechub.cpu.tree_kernels.attention import store_and_attend
from vllm_spechub.cpu.tree_kernels.sampling import (
    sample_children,
    verify_tree,
    write_tokens,
)
from vllm_spechub.rules.base import TreeKernels
from vllm_spechub.rules.draft_state import DraftState
from vllm_spechub.rules.kernel_rule import KernelRule
from vllm_spechub.trees.level_tree import LevelTree
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels.arguments import Requests, TargetRows
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES


def warm_up() -> None:
    """Run each Numba kernel once on tiny inputs."""
    trees = (TokenTree.chain(1), LevelTree((1,)))
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    logits = torch.zeros(1, 8)
    states = [DraftState.empty(tree, 1, 8, torch.float32, torch.device("cpu")) for tree in trees]
    requests = Requests(zero, zero, one, zero)
    target = TargetRows(logits.expand(2, -1), one, zero, zero + 1, torch.zeros(2).long())
    kernels = TreeKernels(sample_children, verify_tree, write_tokens, allocate_children)
    # One rule of each direction (`Rule.direction`) compiles everything.
    for name in {rule.direction: rule.name for rule in BUILTIN_RULES.values()}.values():
        rule = KernelRule(name, kernels)
        for state in states:
            rule.sample_children(logits, state.level(0, zero), requests, state)
            rule.verify(target, requests, state)
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
        np.zeros(1, np.float32),
        query.copy(),
    )
