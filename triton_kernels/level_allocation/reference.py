# SPDX-License-Identifier: Apache-2.0
"""Level allocation in plain PyTorch: what the kernels must reproduce, up to rounding."""

from typing import NamedTuple

import torch

from ..arguments import GrownTrees, Requests
from ..constants import (
    CONFIDENT,
    FIRST_SAMPLE_LOSS,
    LONE_SAMPLE,
    LOWEST,
    MAX_CHILDREN,
    SAMPLE_SHARES,
)
from ..logits import finite
from ..rules import BUILTIN_RULES, Rule


class Worth(NamedTuple):
    """What the children of nodes are worth, by how many there are."""

    # [num_rows, MAX_CHILDREN, MAX_CHILDREN]: what the child in each slot is expected to be
    # accepted with, by the number of children less 1; 0 past the last
    slots: torch.Tensor
    # [num_rows, MAX_CHILDREN]: what each further child adds; never rises
    gains: torch.Tensor


def top_shares(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    # [num_rows]
    temperature: torch.Tensor,
) -> torch.Tensor:
    """The largest probabilities, falling; those of greedy rows at temperature 1; 0 where a row
    masks every token. [num_rows, MAX_CHILDREN] float32"""
    left = finite(logits)
    peak = left.amax(dim=1, keepdim=True)
    scale = 1.0 / torch.where(temperature == 0, 1.0, temperature).unsqueeze(1)
    weights = torch.exp((left - peak) * scale).masked_fill_(left <= LOWEST, 0.0)
    best = weights.topk(min(MAX_CHILDREN, weights.shape[1]), dim=1).values
    total = weights.sum(dim=1, keepdim=True)
    shares = best / total.masked_fill(total == 0, 1.0)
    return torch.nn.functional.pad(shares, (0, MAX_CHILDREN - shares.shape[1]))


def worth(
    # [num_rows, MAX_CHILDREN]
    shares: torch.Tensor,
    # [num_rows] bool
    greedy: torch.Tensor,
    rule: Rule,
) -> Worth:
    """What children are worth to nodes with these largest probabilities."""
    never, always, confident = rule.hubs.value
    places = torch.arange(MAX_CHILDREN, device=shares.device)
    num_confident = (shares > CONFIDENT).sum(dim=1)
    slots = torch.zeros(len(shares), MAX_CHILDREN, MAX_CHILDREN, device=shares.device)
    gains = torch.zeros_like(shares)
    best, falling = torch.zeros_like(shares[:, 0]), torch.full_like(shares[:, 0], torch.inf)
    sample_shares = torch.tensor(SAMPLE_SHARES, device=shares.device)
    for k in range(1, MAX_CHILDREN + 1):
        num_hubs = num_confident.clamp(max=confident).clamp(min=always).clamp(max=k - never)
        num_hubs = torch.where(greedy, k, num_hubs).unsqueeze(1)
        hubs = shares * (places < num_hubs)
        off_hubs = (1.0 - hubs.sum(dim=1, keepdim=True)).clamp(min=0.0)
        number = (places - num_hubs).clamp(min=0)
        sample = sample_shares[number] * off_hubs
        sample *= torch.where(number == 0, 1.0 - FIRST_SAMPLE_LOSS * off_hubs, 1.0)
        expected = torch.where(places < num_hubs, hubs, sample) * (places < k)
        if k == 1:
            lone = LONE_SAMPLE + (1.0 - LONE_SAMPLE) * shares[:, :1] ** 2
            expected[:, :1] = torch.where(num_hubs == 0, lone, expected[:, :1])
        value = expected.sum(dim=1)
        falling = torch.minimum(falling, (value - best).clamp(min=0.0))
        best = torch.maximum(best, value)
        gains[:, k - 1] = falling
        if rule.ranks_subtrees:
            expected = expected.sort(dim=1, descending=True).values
        slots[:, k - 1] = expected
    return Worth(slots, gains)


def allocate_children(
    # [num_reqs * width, vocab_size]
    logits: torch.Tensor,
    requests: Requests,
    trees: GrownTrees,
    *,
    first_node: int,
    width: int,
    width_below: int,
    rule: str,
) -> None:
    """`level_allocation.allocate_children` on any device, without argument checks."""
    (drafted,) = (requests.req_idx >= 0).nonzero(as_tuple=True)
    req, num_reqs = requests.req_idx[drafted].long(), len(drafted)
    rows = logits.view(-1, width, logits.shape[1])[drafted].flatten(0, 1)
    temperature = requests.temperature[req].repeat_interleave(width)
    shares = top_shares(rows, temperature)
    found = worth(shares, (temperature == 0) | (shares[:, 0] == 0), BUILTIN_RULES[rule])

    nodes = torch.arange(first_node, first_node + width, device=logits.device)
    below = first_node + width + torch.arange(width_below, device=logits.device)
    at, at_below = (req.unsqueeze(1), nodes), (req.unsqueeze(1), below)
    most = min(MAX_CHILDREN, width_below)
    reach = trees.reach[at]
    gains = (reach.flatten().unsqueeze(1) * found.gains[:, :most]).view(num_reqs, -1)
    order = gains.sort(dim=1, descending=True, stable=True).indices[:, :width_below]
    counts = torch.zeros(num_reqs, width, dtype=torch.int64, device=logits.device)
    counts.scatter_add_(1, order // most, torch.ones_like(order))

    ends = counts.cumsum(dim=1)
    number = below - (first_node + width)
    # [num_reqs, width_below]: of each child, its parent's place in the level, and its slot
    parent = (ends.unsqueeze(1) <= number.unsqueeze(1)).sum(dim=2)
    slot = number - (ends - counts).gather(1, parent)
    row = torch.arange(num_reqs, device=logits.device).unsqueeze(1) * width + parent
    expected = found.slots[row, counts.gather(1, parent) - 1, slot]
    first = first_node + width + ends - counts
    trees.tables.first_child[at] = first.to(torch.int32)
    trees.tables.num_children[at] = counts.to(torch.int32)
    trees.tables.parents[at_below] = (parent + first_node).to(torch.int32)
    masks = trees.ancestor_masks[at].gather(1, parent)
    trees.ancestor_masks[at_below] = masks | (torch.ones_like(below) << below)
    trees.reach[at_below] = reach.gather(1, parent) * expected
