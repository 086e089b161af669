# SPDX-License-Identifier: Apache-2.0
"""The CPU's compiled level allocation against the PyTorch reference."""

import pytest
import torch

from helpers.levels import allocated, random_logits
from vllm_spechub.cpu.tree_kernels.allocation import allocate_children
from vllm_spechub.cpu.tree_kernels.sampling import sample_children, verify_tree, write_tokens
from vllm_spechub.rules.base import TreeKernels
from vllm_spechub.rules.draft_state import DraftState
from vllm_spechub.rules.kernel_rule import PORTABLE_KERNELS, KernelRule
from vllm_spechub.trees.level_tree import LevelTree
from vllm_spechub.triton_kernels.arguments import Requests
from vllm_spechub.triton_kernels.level_allocation import reference
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES

HOST = TreeKernels(sample_children, verify_tree, write_tokens, allocate_children)
BRANCHING = [name for name, rule in BUILTIN_RULES.items() if rule.max_children > 1]
TREES = [LevelTree(widths) for widths in ((3, 4, 4, 3), (1, 4, 6), (4, 16, 8, 2))]


def requests_of(num_reqs: int) -> Requests:
    """In rows of their own among more, some of them greedy."""
    temperature = torch.tensor([1.0, 0.6, 0.0, 0.3]).repeat(num_reqs)[: 2 * num_reqs]
    zeros = torch.zeros(2 * num_reqs, dtype=torch.int64)
    return Requests(torch.arange(num_reqs) * 2, zeros[:num_reqs], temperature, zeros)


@pytest.mark.parametrize("tree", TREES, ids=str)
@pytest.mark.parametrize("rule", BRANCHING)
def test_same_trees_as_the_reference(rule, tree):
    """But for near ties."""
    requests = requests_of(40)
    found, expected = (
        allocated(tree, requests, rule, allocate, seed=3, vocab_size=300, device="cpu", odd=True)
        for allocate in (allocate_children, reference.allocate_children)
    )
    same = (found.tables.parents == expected.tables.parents).all(dim=1)
    assert same.float().mean() > 0.97
    for mine, theirs in zip(found.tables, expected.tables, strict=True):
        if mine.dim() > 1:
            assert torch.equal(mine[same], theirs[same])
    assert torch.equal(found.ancestor_masks[same], expected.ancestor_masks[same])
    torch.testing.assert_close(found.reach[same], expected.reach[same], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["mixed", "match"])
def test_states_hold_what_the_portable_kernels_give(rule):
    """Tokens, where they stand, and which were drawn, level by level."""
    tree, requests = TREES[0], requests_of(6)
    states = [DraftState.empty(tree, 12, 50, torch.float32, torch.device("cpu")) for _ in range(2)]
    for depth in range(tree.depth):
        for state, kernels in zip(states, (HOST, PORTABLE_KERNELS), strict=True):
            level = state.level(depth, requests.req_idx)
            logits = random_logits(6 * len(level.nodes_np), 50, 5 + depth, "cpu")
            KernelRule(rule, kernels).sample_children(logits, level, requests, state)
    ours, theirs = states
    assert torch.equal(ours.tables.parents, theirs.tables.parents)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.drafts.sampled, theirs.drafts.sampled)
    assert (ours.tokens[::2] != 0).float().mean() > 0.9
    # a child's row of the level above is its parent's
    level = ours.level(2, requests.req_idx)
    rows = level.rows(6)
    first, width = 1, tree.widths[0]
    parents = ours.tables.parents[requests.req_idx][:, level.nodes_np].flatten()
    assert rows.parent_rows.tolist() == (rows.req * width + parents - first).tolist()
    masks = ours.grown.ancestor_masks[requests.req_idx][:, level.nodes_np].flatten()
    assert torch.equal(rows.ancestor_masks, masks)
