# SPDX-License-Identifier: Apache-2.0
"""Requests of one batch whose trees differ: each is verified as if its tree was everyone's."""

import random

import pytest
import torch

from helpers.levels import grown_as, random_tree
from vllm_spechub.cpu.tree_kernels import sampling as numba_kernels
from vllm_spechub.trees.level_tree import LevelTree
from vllm_spechub.triton_kernels import rng
from vllm_spechub.triton_kernels.arguments import Drafts, Requests, TargetRows, TreeTables
from vllm_spechub.triton_kernels.child_sampling import reference as child_sampling
from vllm_spechub.triton_kernels.verification import kernel, reference, verify_tree

LEVELS = LevelTree((3, 4, 3))
NUM_REQS = 8
TEMPERATURES = [1.0, 0.6, 0.0, 1.0]


def on_device(device: str):
    def verify(*arguments, **options):
        moved = (
            values._make(None if value is None else value.to(device) for value in values)
            for values in arguments
        )
        return tuple(value.cpu() for value in kernel.verify_tree(*moved, **options))

    return verify


def make_case(rule: str, vocab_size: int = 9):
    """Arguments, and for each request those with its own tree as everyone's."""
    source, generator = random.Random(3), torch.Generator().manual_seed(4)
    trees = [random_tree(LEVELS, source) for _ in range(NUM_REQS)]
    grown = grown_as(LEVELS, trees)
    width, num_internal = LEVELS.num_nodes + 1, len(LEVELS.internal_nodes)
    draft = torch.randn(NUM_REQS, num_internal, vocab_size, generator=generator) * 2
    target = torch.randn(NUM_REQS, width, vocab_size, generator=generator) * 0.3
    target[:, :num_internal] += draft
    # as states stand in another order than requests
    req_idx = torch.arange(NUM_REQS).roll(3)
    requests = Requests(
        req_idx,
        torch.arange(NUM_REQS) + 11,
        torch.tensor(TEMPERATURES).repeat(NUM_REQS)[:NUM_REQS],
        torch.arange(NUM_REQS) * 77,
    )
    tokens = torch.zeros(NUM_REQS, width, dtype=torch.int64)
    sampled = torch.zeros(NUM_REQS, num_internal, dtype=torch.int32)
    for node in range(num_internal):
        counts = grown.tables.num_children[req_idx, node]
        children = child_sampling.sample_children(
            draft[req_idx, node],
            torch.full((NUM_REQS,), node, dtype=torch.int32),
            counts,
            requests,
            rule=rule,
            max_children=4,
        )
        sampled[req_idx, node] = children.sampled
        for request, req in enumerate(req_idx.tolist()):
            first = int(grown.tables.first_child[req, node])
            own = slice(first, first + int(counts[request]))
            tokens[request, own] = children.tokens[request, : int(counts[request])]
    num_nodes = torch.full((NUM_REQS,), LEVELS.num_nodes, dtype=torch.int32)
    num_nodes[2], num_nodes[5] = 5, 8  # truncated
    rows = TargetRows(
        target.flatten(0, 1),
        requests.temperature,
        torch.arange(NUM_REQS, dtype=torch.int32) * width,
        num_nodes,
        tokens.flatten(),
    )
    drafts = Drafts(draft, sampled)
    static = [
        TreeTables(
            torch.from_numpy(trees[req].first_child),
            torch.from_numpy(trees[req].num_children),
            grown.tables.internal_index,
            torch.tensor([0, *trees[req].parents], dtype=torch.int32),
        )
        for req in req_idx.tolist()
    ]
    options = {"level_sizes": LEVELS.level_sizes, "rule": rule}
    return (rows, drafts, requests), grown.tables, static, options


@pytest.mark.parametrize("rule", ["mixed", "traversal", "unordered", "match"])
def test_each_tree_is_verified_as_if_alone(monkeypatch, device, rule):
    monkeypatch.setattr(rng, "LANES", 16)
    arguments, tables, static, options = make_case(rule)
    expected = reference.verify_tree(*arguments, tables, **options)
    for request, own in enumerate(static):
        alone = reference.verify_tree(*arguments, own, **options)
        for found, wanted in zip(expected, alone, strict=True):
            assert torch.equal(found[request], wanted[request])
    assert expected.num_emitted.unique().numel() > 2
    for verify in (on_device(device), numba_kernels.verify_tree):
        for found, wanted in zip(verify(*arguments, tables, **options), expected, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("rule", ["mixed", "unordered"])
def test_reach_of_each_tree(rule):
    arguments, tables, static, options = make_case(rule)
    options.pop("level_sizes")
    together = reference.reach(*arguments, tables, **options)
    for request, own in enumerate(static):
        alone = reference.reach(*arguments, own, **options)
        assert torch.equal(together[request], alone[request])
    assert (together.sum(dim=1) > 1).all()


def test_tables_need_a_row_for_each_request():
    arguments, tables, _, options = make_case("mixed")
    short = tables._replace(first_child=tables.first_child[1:])
    with pytest.raises(ValueError, match="must be"):
        verify_tree(*arguments, short, **options)
