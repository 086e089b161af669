# SPDX-License-Identifier: Apache-2.0
"""One node: its acceptance in closed form and at its optimum, and float32 on rows that are hard.

`test_tree_rules` compares `node_outcome` with exact vectors on every node that it meets.
"""

import itertools
import random
from fractions import Fraction

import pytest
import torch

from helpers.enumeration import DRAFTING, SPECIAL, accepted, normalised
from vllm_spechub.rules.acceptance import acceptance
from vllm_spechub.rules.optimum import otm
from vllm_spechub.triton_kernels.verification.node import node_outcome

F = Fraction
OPTIMAL = ("traversal", "ordered", "unordered", "chain", "match")
"""Rules whose samples are one at most: nothing accepts more of what they draft."""

CASES = [
    (size, k, rule)
    for size in (3, 4)
    for rule in DRAFTING
    for k in range(1, 2 if rule == "chain" else size + 1)
]


def floats(row) -> torch.Tensor:
    return torch.tensor([*map(float, row)], dtype=torch.float64)


def random_pairs(size: int, count: int, seed: int):
    source = random.Random(seed)
    for _ in range(count):
        rows = [[source.randint(0, 6) for _ in range(size)] for _ in range(2)]
        yield tuple(normalised(row if any(row) else [1] * size) for row in rows)


@pytest.mark.parametrize(("size", "k", "rule"), CASES)
def test_closed_form_is_what_every_slot_accepts(size, k, rule):
    drafting = DRAFTING[rule]
    pairs = [*itertools.product(SPECIAL[size], repeat=2), *random_pairs(size, 20, k)]
    for power in (1, 2) if drafting.sharpens else (1,):
        exact = [accepted(p, q, k, drafting, power) for p, q in pairs]
        found = acceptance(
            torch.stack([floats(p) for p, _ in pairs]),
            torch.stack([floats(q) for _, q in pairs]),
            k,
            rule,
            sharpening=float(power),
        )
        wanted = torch.stack([floats(slots) for slots in exact])
        torch.testing.assert_close(found.slots, wanted, rtol=0, atol=1e-9)
        torch.testing.assert_close(found.node, wanted.sum(dim=1), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("size", "k", "rule"), CASES)
def test_optimum(size, k, rule):
    """One sample at most: the optimum of the linear program, exactly. Else never above it."""
    pairs = [*itertools.islice(itertools.product(SPECIAL[size], repeat=2), 0, None, 7)]
    pairs += random_pairs(size, 8, k)
    below = 0
    for p, q in pairs:
        found = float(sum(accepted(p, q, k, DRAFTING[rule])))
        most = otm(floats(p), floats(q), k, rule)
        # as exact as the solver is
        assert found <= most + 1e-6
        below += found < most - 1e-6
    if rule in OPTIMAL or k == 1:
        assert below == 0
    elif rule in ("rrs", "rrsw") and k < size:
        assert below  # so that the bound means something


def hard_rows(num_rows: int, scale: float, dtype: torch.dtype, seed: int):
    """Target and draft rows over 3000 tokens, alike, and children as drafted."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size, most = 3000, 4
    draft = torch.randn(num_rows, vocab_size, generator=generator).double() * scale
    target = draft + torch.randn(num_rows, vocab_size, generator=generator) * 0.5 * scale
    num_hubs = torch.randint(0, 4, (num_rows,), generator=generator)
    count = torch.randint(1, most + 1, (num_rows,), generator=generator)
    children = torch.full((num_rows, most), -1)
    sampled = torch.zeros(num_rows, most, dtype=torch.bool)
    ranks = draft.topk(most, dim=1).indices
    for row in range(num_rows):
        k = int(count[row])
        m = min(int(num_hubs[row]), k)
        hubs = ranks[row, :m]
        weights = (draft[row] - draft[row].max()).exp().index_fill(0, hubs, 0.0)
        drawn = torch.multinomial(weights, k - m, generator=generator) if k > m else hubs[:0]
        order = torch.randperm(k, generator=generator)
        children[row, :k] = torch.cat([hubs, drawn])[order]
        sampled[row, :k] = (torch.arange(k) >= m)[order]
    acceptance = torch.rand(num_rows, generator=generator).double()
    acceptance[::3] = 1.0
    return (
        torch.softmax(target, dim=1).to(dtype),
        draft.to(dtype),
        children,
        sampled,
        acceptance.to(dtype),
    )


@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0, 30.0])
def test_float32_is_as_good_as_float64(scale):
    """However confident the draft is: nothing cancels."""
    for seed in range(2):
        rows = hard_rows(96, scale, torch.float64, seed)
        target, draft, children, sampled, accept = rows
        # the same numbers in both precisions
        single = target.float(), draft.float(), children, sampled, accept.float()
        double = (*(value.double() for value in single[:2]), children, sampled, single[4].double())
        found, wanted = (node_outcome(*given, replaced=False) for given in (single, double))
        order = torch.where(sampled, 0, 4) + torch.arange(4)
        reach = torch.ones(len(accept)).double()
        for place in order.argsort(dim=1).unbind(1):
            slot = place.unsqueeze(1)
            ours, theirs = (value.visit.gather(1, slot).squeeze(1) for value in (found, wanted))
            assert ((ours - theirs).abs() * reach).max() < 1e-5
            reach = reach * (1 - theirs)
        assert ((found.leave - wanted.leave).abs() * reach).max() < 1e-5
        emitted = [
            value.residual / value.residual.sum(1, keepdim=True) for value in (found, wanted)
        ]
        assert ((emitted[0] - emitted[1]).abs().sum(dim=1) * reach * wanted.leave).max() < 1e-5
        assert torch.isfinite(found.residual).all()


@pytest.mark.parametrize("replaced", [False, True])
def test_no_impossible_outcome(replaced):
    """Vanishing tails, target equal to draft, nothing to draw: chances stay chances in float32."""
    size = 4
    rows = [floats(row) for row in SPECIAL[size]] + [torch.zeros(size).double()]
    rows += [torch.softmax(-s * torch.arange(size).double(), 0) for s in (1.0, 10.0, 40.0, 150.0)]
    given = []
    for p, q, count in itertools.product(rows, rows, range(1, 4)):
        for bits in range(1 << count):
            sampled = [bool(bits >> slot & 1) for slot in range(count)]
            children = [*range(count)]
            if replaced and all(sampled):
                children = [0] * count
            given += [(p, q, children + [-1] * (3 - count), sampled + [False] * (3 - count))]
    p, q = (torch.stack(column).float() for column in list(zip(*given, strict=True))[:2])
    children = torch.tensor([case[2] for case in given])
    sampled = torch.tensor([case[3] for case in given])
    for accept in (1.0, 0.3):
        found = node_outcome(
            p, q.log(), children, sampled, torch.full((len(p),), accept), replaced=replaced
        )
        for value in found:
            assert torch.isfinite(value).all()
            assert (value >= 0).all()
        assert (found.visit <= 1).all()
        assert (found.leave <= 1).all()
        if accept == 1.0:
            assert (found.leave == 1).all()
        impossible = p.gather(1, children.clamp(min=0)) == 0
        assert (found.visit[impossible] == 0).all()
        assert (found.residual[p == 0] == 0).all()
        possible = p.sum(dim=1) > 0
        assert (found.residual.sum(dim=1) > 0)[possible].all()
