# SPDX-License-Identifier: Apache-2.0
"""Which nodes of a level get how many children: the kernel, the reference, and fractions."""

import itertools

import pytest
import torch

from helpers.enumeration import DRAFTING, level_counts, normalised
from helpers.levels import allocated, grown_trees, random_logits, static_tree
from vllm_spechub.trees.level_tree import LevelTree
from vllm_spechub.triton_kernels.arguments import Requests
from vllm_spechub.triton_kernels.constants import LOWEST
from vllm_spechub.triton_kernels.level_allocation import allocate_children, kernel, reference
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES

RULES = [name for name, rule in BUILTIN_RULES.items() if rule.max_children > 1]
TREES = [LevelTree(widths) for widths in ((3, 4, 4, 3), (1, 4, 6), (4, 16, 8, 2), (2, 2, 5, 9))]


def requests_of(num_reqs: int, device, temperatures=(1.0, 0.6, 0.0)) -> Requests:
    """Some with rows of their own among more, one of them greedy."""
    req_idx = torch.arange(num_reqs, device=device, dtype=torch.int32) * 2 % (2 * num_reqs)
    temperature = torch.tensor(
        [temperatures[r // 2 % len(temperatures)] for r in range(2 * num_reqs)], device=device
    )
    zeros = torch.zeros(2 * num_reqs, dtype=torch.int64, device=device)
    return Requests(req_idx, zeros[:num_reqs], temperature, zeros)


@pytest.mark.parametrize(
    ("rule", "tree"), [("mixed", TREES[0]), ("traversal", TREES[1]), ("match", TREES[1])], ids=str
)
def test_kernel_and_reference_agree(rule, tree, device):
    requests = requests_of(3, device)
    found, expected = (
        allocated(tree, requests, rule, allocate, seed=3, vocab_size=300, device=device)
        for allocate in (kernel.allocate_children, reference.allocate_children)
    )
    for mine, theirs in zip(found.tables, expected.tables, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(found.ancestor_masks, expected.ancestor_masks)
    torch.testing.assert_close(found.reach, expected.reach, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_drafted_trees_are_trees(tree, device):
    """Breadth-first, with the widths that were asked for, whatever is masked or tied."""
    requests = requests_of(4, device)
    trees = allocated(
        tree, requests, "mixed", allocate_children, seed=1, vocab_size=40, device=device, odd=True
    )
    shapes: set[tuple[int, ...]] = set()
    for req in requests.req_idx.tolist():
        static = static_tree(trees, req)  # checks the numbering
        assert static.level_sizes == tree.level_sizes
        assert trees.tables.num_children[req].tolist() == static.num_children.tolist()
        inner = static.internal_nodes
        assert trees.tables.first_child[req, inner].tolist() == static.first_child[inner].tolist()
        assert trees.ancestor_masks[req].tolist() == static.ancestor_masks.tolist()
        shapes.add(static.parents)
    assert len(shapes) > 1


def test_requests_without_drafts_are_left_alone(device):
    requests = requests_of(3, device)
    requests.req_idx[1] = -1
    tree = TREES[1]
    trees = allocated(
        tree, requests, "mixed", kernel.allocate_children, seed=1, vocab_size=40, device=device
    )
    untouched = grown_trees(tree, len(requests.temperature), device)
    for row in (1, 2, 3, 5):
        assert torch.equal(trees.tables.parents[row], untouched.tables.parents[row])
        assert torch.equal(trees.reach[row], untouched.reach[row])
    assert not torch.equal(trees.reach[0], untouched.reach[0])


@pytest.mark.parametrize("rule", [rule for rule in RULES if not DRAFTING[rule].replaces])
def test_allocation_in_fractions(rule):
    """The counts are those of the exact model, with which losslessness is enumerated."""
    import random

    source = random.Random(5)
    for widths in ((3, 5), (2, 7), (4, 4)):
        rows = [
            normalised([source.randint(1, 90) ** 2 for _ in range(5)]) for _ in range(widths[0])
        ]
        reach = [normalised([source.randint(1, 9), 10])[0] for _ in rows]
        tree = LevelTree((widths[0], widths[1]))
        trees = grown_trees(tree, 1, "cpu")
        trees.reach[0, 1 : 1 + widths[0]] = torch.tensor([float(r) for r in reach])
        logits = torch.tensor([[float(x) for x in row] for row in rows]).log()
        zeros = torch.zeros(1, dtype=torch.int64)
        reference.allocate_children(
            logits,
            Requests(zeros, zeros, torch.ones(1), zeros),
            trees,
            first_node=1,
            width=widths[0],
            width_below=widths[1],
            rule=rule,
        )
        counts = level_counts(rows, reach, widths[1], DRAFTING[rule], 4)
        assert trees.tables.num_children[0, 1 : 1 + widths[0]].tolist() == counts


@pytest.mark.parametrize("rule", RULES)
def test_no_other_counts_are_worth_more(rule):
    """Brute force over all counts, by values whose gains fall."""
    traits = BUILTIN_RULES[rule]
    shares = torch.rand(3, 4).sort(dim=1, descending=True).values
    shares /= shares.sum(dim=1, keepdim=True) * 1.1
    reach = torch.tensor([0.9, 0.5, 0.3])
    gains = (
        reach.unsqueeze(1) * reference.worth(shares, torch.zeros(3, dtype=torch.bool), traits).gains
    )
    assert (gains.diff(dim=1) <= 0).all()
    values = torch.nn.functional.pad(gains.cumsum(dim=1), (1, 0))
    for total in (2, 5, 9):
        best = max(
            sum(float(values[node, k]) for node, k in enumerate(counts))
            for counts in itertools.product(range(5), repeat=3)
            if sum(counts) == total
        )
        chosen = float(gains.flatten().sort(descending=True).values[:total].sum())
        assert chosen == pytest.approx(best, rel=1e-6)


def test_top_shares_of_odd_rows():
    logits = torch.full((4, 6), -torch.inf)
    logits[1, 3], logits[2] = 2.0, torch.nan
    logits[3] = torch.tensor([1.0, torch.inf, 0.0, -1.0, torch.nan, LOWEST])
    shares = reference.top_shares(logits, torch.tensor([1.0, 0.0, 1.0, 0.5]))
    assert shares.tolist() == [[0.0] * 4, [1.0, 0, 0, 0], [0.0] * 4, [1.0, 0, 0, 0]]


def test_arguments_are_checked(device):
    tree, requests = TREES[0], requests_of(2, device)
    trees = grown_trees(tree, 4, device)
    logits = random_logits(6, 20, 1, device)

    def call(**changes):
        arguments = {"first_node": 1, "width": 3, "width_below": 4, "rule": "mixed"} | changes
        allocate_children(arguments.pop("logits", logits), requests, trees, **arguments)

    with pytest.raises(ValueError, match=r"num_reqs \* width"):
        call(logits=logits[1:])
    with pytest.raises(ValueError, match=r"width_below must be in 1\.\.12"):
        call(width_below=13)
    with pytest.raises(ValueError, match="too few"):
        call(first_node=12)
    with pytest.raises(ValueError, match="rule is 'no'"):
        call(rule="no")
