# SPDX-License-Identifier: Apache-2.0
"""Child sampling in plain PyTorch: what the kernels must reproduce."""

import torch

from .. import rng
from ..arguments import Children, KeptRows, Requests
from ..constants import CONFIDENT, FIRST_SAMPLE_LOSS, LOWEST, SAMPLE_SHARES
from ..logits import finite
from ..rules import BUILTIN_RULES


def sample_children(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    # [num_rows]
    node_ids: torch.Tensor,
    # [num_rows]
    num_children: torch.Tensor,
    requests: Requests,
    *,
    rule: str,
    max_children: int,
    sharpening: float = 1.0,
    keep: KeptRows | None = None,
) -> Children:
    """`child_sampling.sample_children` on any device, without argument checks."""
    traits = BUILTIN_RULES[rule]
    req = requests.req_idx.clamp(min=0).long()
    temperature = requests.temperature[req]
    if keep is not None:
        keep_rows(keep, logits, requests)
    left = finite(logits)
    peak = left.amax(dim=1)
    # A row without any possible token is drafted as a greedy one.
    greedy = (temperature == 0) | (peak == LOWEST)
    scale = 1.0 / torch.where(temperature == 0, 1.0, temperature)
    key = rng.row_key(requests.seeds[req], requests.root_positions, node_ids, rng.CHILD)
    total = _weights(left, peak, scale).sum(dim=1)
    never, always, confident = traits.hubs.value
    # [num_rows]: children that are hubs whatever the draft, and that may be
    least, most = ((num_children - never).clamp(max=most) for most in (always, confident))

    # [num_rows] each, one for every child: hubs by rank, then samples as they were drawn
    tokens, drawn, expected = [], [], []
    num_hubs = torch.zeros_like(num_children)
    off_hubs = torch.ones_like(peak)
    for place in range(max_children):
        best = rng.best(left)
        logit = left.gather(1, best.unsqueeze(1)).squeeze(1)
        prob = torch.exp((logit - peak) * scale) / total
        hub = greedy | (place < least) | ((place < most) & (prob > CONFIDENT))
        hub &= num_hubs == place
        off_hubs = torch.where(
            num_hubs == place, _weights(left, peak, scale).sum(dim=1) / total, off_hubs
        )
        sample = rng.draw(_weights(left, logit, scale * sharpening), key, place)
        # Where nothing is left to draw from, the next token was chosen without chance.
        sampled = ~hub & (logit > LOWEST)
        token = torch.where(sampled, sample, best)
        share = _sample_acceptance(off_hubs, place - num_hubs)
        present = place < num_children
        tokens.append(token.masked_fill(~present, -1))
        drawn.append(sampled & present)
        expected.append(torch.where(sampled, share, prob).masked_fill(~present, -1.0))
        num_hubs = num_hubs + hub.to(num_hubs.dtype)
        taken = torch.zeros_like(left, dtype=torch.bool).scatter_(1, token.unsqueeze(1), True)
        if traits.replaces:
            taken &= ~sampled.unsqueeze(1)
        left = left.masked_fill(taken, -torch.inf)

    token, drawn = torch.stack(tokens, dim=1), torch.stack(drawn, dim=1)
    if traits.ranks_subtrees:
        slots = _by_expectation(torch.stack(expected, dim=1), drawn)
        token, drawn = token.gather(1, slots), drawn.gather(1, slots)
    bits = (drawn.to(torch.int32) << torch.arange(max_children, device=drawn.device)).sum(dim=1)
    undrafted = requests.req_idx < 0
    token = token.masked_fill(undrafted.unsqueeze(1), -1)
    return Children(token, bits.masked_fill(undrafted, -1).to(torch.int32))


def keep_rows(
    keep: KeptRows,
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    requests: Requests,
) -> None:
    """Keep those rows that verification may read."""
    req = requests.req_idx.clamp(min=0).long()
    drawn = (requests.temperature[req] != 0) & (requests.req_idx >= 0)
    (rows,) = drawn.nonzero(as_tuple=True)
    keep.logits[req[rows], keep.internal[rows]] = logits[rows]


def _weights(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    # [num_rows]
    peak: torch.Tensor,
    # [num_rows]
    scale: torch.Tensor,
) -> torch.Tensor:
    """Unnormalised probabilities relative to a logit, 0 for masked tokens. [num_rows,
    vocab_size]"""
    weights = torch.exp((logits - peak.unsqueeze(1)) * scale.unsqueeze(1))
    return weights.masked_fill_(logits <= LOWEST, 0.0)


def _sample_acceptance(
    # [num_rows], z: the draft's mass off the hubs
    off_hubs: torch.Tensor,
    # [num_rows], how many samples were drawn before
    number: torch.Tensor,
) -> torch.Tensor:
    """What a sample is expected to be accepted with, whatever its token is. [num_rows]"""
    shares = torch.tensor(SAMPLE_SHARES, device=off_hubs.device)[number.clamp(min=0).long()]
    return shares * off_hubs * torch.where(number == 0, 1.0 - FIRST_SAMPLE_LOSS * off_hubs, 1.0)


def _by_expectation(
    # [num_rows, max_children]
    expected: torch.Tensor,
    # [num_rows, max_children]
    drawn: torch.Tensor,
) -> torch.Tensor:
    """The child of every slot, [num_rows, max_children]: by falling expectation, of a tie the one
    that is visited first, which samples are."""
    samples_first = (~drawn).to(torch.int8).argsort(dim=1, stable=True)
    by_rank = expected.gather(1, samples_first).argsort(dim=1, descending=True, stable=True)
    return samples_first.gather(1, by_rank)
