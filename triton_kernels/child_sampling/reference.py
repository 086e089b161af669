# SPDX-License-Identifier: Apache-2.0
"""Child sampling in plain PyTorch: what the kernels must reproduce."""

import torch

from .. import rng
from ..arguments import Children, Requests
from ..constants import LOWEST
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
) -> Children:
    """`child_sampling.sample_children` on any device, without argument checks."""
    traits = BUILTIN_RULES[rule]
    req = requests.req_idx.clamp(min=0).long()
    # Masked tokens still rank above tokens that are taken out, which are -inf.
    logits = logits.to(torch.float32).clamp(min=LOWEST)
    # [num_rows, 1]
    row_temperature = requests.temperature[req].unsqueeze(1)
    # A row without any possible token is drafted as a greedy one.
    greedy = (row_temperature == 0) | (logits.amax(dim=1, keepdim=True) == LOWEST)
    scale = 1.0 / torch.where(row_temperature == 0, 1.0, row_temperature)
    last_slot = num_children.unsqueeze(1) - 1
    keys = [
        rng.row_key(requests.seeds[req], requests.root_positions, node_ids, use)
        for use in (rng.CHILD, rng.LABEL)
    ]
    if traits.is_recursive:
        tokens = _draw_all(logits, scale, greedy, keys[0], traits.replaces, max_children)
        tokens.masked_fill_(torch.arange(max_children, device=logits.device) > last_slot, -1)
        sample_slot = torch.zeros_like(last_slot)
    else:
        tokens, sample_slot = _draw_spechub(
            logits, scale, greedy, keys, last_slot, max_children, sharpening, traits.ordered_slots
        )
    undrafted = (requests.req_idx < 0).unsqueeze(1)
    tokens.masked_fill_(undrafted, -1)
    sample_slots = sample_slot.masked_fill(undrafted, -1).squeeze(1).to(torch.int32)
    return Children(tokens, sample_slots)


def _race(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    # [num_rows, 1]
    scale: torch.Tensor,
    # [num_rows, 1]
    greedy: torch.Tensor,
    # [num_rows, vocab_size]
    bits: torch.Tensor,
) -> torch.Tensor:
    """Scores whose largest is a draw from softmax(logits * scale), in descending order draws
    without replacement. Without noise, or where all tokens are masked, the best-ranked leads."""
    noise = rng.exponential(bits).log_().masked_fill_(greedy, 0.0)
    return (logits * scale).sub_(noise).clamp_(min=LOWEST)


def _draw_all(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    # [num_rows, 1]
    scale: torch.Tensor,
    # [num_rows, 1]
    greedy: torch.Tensor,
    # [num_rows]
    key: torch.Tensor,
    with_replacement: bool,
    max_children: int,
) -> torch.Tensor:
    """Tokens [num_rows, max_children], drawn from the draft one after the other."""
    vocab_size = logits.shape[1]
    # Slot j of independent draws counts on where slot j - 1 ended.
    bits = rng.element_hash(key, vocab_size * (max_children if with_replacement else 1))
    bits = bits.unflatten(1, (-1, vocab_size))
    race = _race(logits, scale, greedy, bits[:, 0])
    tokens = []
    for slot in range(max_children):
        # `max` returns the lowest index of a tie; `topk` promises nothing.
        token = race.max(dim=1, keepdim=True).indices
        race.scatter_(1, token, -torch.inf)
        if with_replacement and slot > 0:
            drawn = _race(logits, scale, greedy, bits[:, slot]).max(dim=1, keepdim=True).indices
            token = torch.where(greedy, token, drawn)
        tokens.append(token)
    return torch.cat(tokens, dim=1)


def _draw_off_hubs(
    # [num_rows, vocab_size], -inf for the hubs
    logits: torch.Tensor,
    # [num_rows, 1]
    scale: torch.Tensor,
    # [num_rows, 1]
    greedy: torch.Tensor,
    # [num_rows]
    key: torch.Tensor,
) -> torch.Tensor:
    """A draw from softmax(logits * scale), [num_rows, 1], by lanes as `rng.draw` does it; the
    best-ranked token of greedy rows and of those where nothing is left."""
    best, token = logits.max(dim=1, keepdim=True)
    scaled = (logits * scale).clamp_(min=LOWEST).masked_fill_(logits == -torch.inf, -torch.inf)
    by_lane = rng.lanes(scaled, -torch.inf)
    _, depth, num_lanes = by_lane.shape
    peak = by_lane.amax(dim=1)
    total = torch.exp(by_lane - peak.clamp(min=LOWEST).unsqueeze(1)).sum(dim=1)
    noise = rng.exponential(rng.element_hash(key, num_lanes)).log_()
    lane = (peak + total.log() - noise).max(dim=1, keepdim=True).indices
    drawn = lane
    if depth > 1:
        own = by_lane.gather(2, lane.unsqueeze(1).expand(-1, depth, 1)).squeeze(2)
        noise = rng.exponential(rng.element_hash(key, rng.LANES + depth)[:, rng.LANES :]).log_()
        drawn = (own - noise).max(dim=1, keepdim=True).indices * num_lanes + lane
    return torch.where(greedy | (best == LOWEST), token, drawn)


def _draw_spechub(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    # [num_rows, 1]
    scale: torch.Tensor,
    # [num_rows, 1]
    greedy: torch.Tensor,
    # [num_rows] each: for the sampled child, for the label
    keys: list[torch.Tensor],
    # [num_rows, 1]
    last_slot: torch.Tensor,
    max_children: int,
    sharpening: float,
    ordered: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [num_rows, max_children] and the sampled child's slot [num_rows, 1]."""
    num_rows = len(logits)
    off_hub = logits
    # Take out the hubs.
    hub_logits = []
    hub_tokens = []
    for rank in range(max_children - 1):
        # [num_rows, 1]
        value, token = off_hub.max(dim=1, keepdim=True)
        is_hub = rank < last_slot
        off_hub = off_hub.scatter(1, token, value.masked_fill(is_hub, -torch.inf))
        hub_logits.append(value.masked_fill(~is_hub, -torch.inf))
        hub_tokens.append(token.masked_fill(~is_hub, -1))
    sampled = _draw_off_hubs(off_hub, scale * sharpening, greedy, keys[0])

    tokens = torch.full((num_rows, max_children), -1, dtype=torch.int64, device=logits.device)
    sample_slot = last_slot.long()
    if max_children > 1:
        # [num_rows, max_children - 1]
        rank = torch.arange(max_children - 1, device=logits.device)
        slot = rank.expand(num_rows, -1)
        hubs = torch.cat(hub_tokens, dim=1)
        if ordered:
            # Weights of the labels: the hubs by rank, then everything off the hubs. A row with one
            # child has no hub, and its label is the sampled child.
            peak = hub_logits[0].clamp(min=LOWEST)
            hub_weight = torch.exp((torch.cat(hub_logits, dim=1) - peak) * scale)
            off_hub_weight = torch.exp((off_hub - peak) * scale).sum(dim=1, keepdim=True)
            threshold = hub_weight.cumsum(dim=1)
            draw = rng.uniform(keys[1]).unsqueeze(1) * (threshold[:, -1:] + off_hub_weight)
            draw.masked_fill_(greedy, 0.0)
            # [num_rows, 1]: rank of the hub in slot 0; last_slot where the sampled child is.
            main = ((threshold <= draw) & (rank < last_slot)).sum(dim=1, keepdim=True)
            slot = torch.where(rank == main, 0, rank + (rank < main))
            sample_slot = sample_slot.masked_fill(main == last_slot, 0)
        # Padding ranks write the -1 that is there already.
        tokens.scatter_(1, torch.where(rank < last_slot, slot, rank + 1), hubs)
    tokens.scatter_(1, sample_slot, sampled)
    return tokens, sample_slot
