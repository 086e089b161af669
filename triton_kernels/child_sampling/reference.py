# SPDX-License-Identifier: Apache-2.0
"""Child sampling in plain PyTorch: what the kernel must reproduce, and the host version."""

import torch

from .. import rng

# Stands for the logit -inf, so that masked tokens still rank above hubs taken out (-inf).
LOWEST = -3.0e38


def sample_children(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    # [max_num_reqs]
    temperature: torch.Tensor,
    # [max_num_reqs]
    seeds: torch.Tensor,
    # [num_rows]
    req_idx: torch.Tensor,
    # [num_rows]
    root_positions: torch.Tensor,
    # [num_rows]
    node_ids: torch.Tensor,
    # [num_rows]
    num_children: torch.Tensor,
    *,
    ordered: bool,
    max_children: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`child_sampling.sample_children` on any device, without argument checks."""
    vocab_size = logits.shape[1]
    drafted = req_idx >= 0
    req = req_idx.clamp(min=0).long()
    # [num_rows, 1]
    row_temperature = temperature[req].unsqueeze(1)
    greedy = row_temperature == 0
    scale = 1.0 / torch.where(greedy, 1.0, row_temperature)
    last_slot = num_children.unsqueeze(1) - 1

    # [num_rows, vocab_size]
    off_hub = logits.to(torch.float32).clamp(min=LOWEST)
    key = rng.row_key(seeds[req], root_positions, node_ids, rng.CHILD)
    noise = rng.exponential(rng.element_hash(key, vocab_size)).log_().masked_fill_(greedy, 0.0)
    # Without noise, or where every token is masked, the race goes to the best-ranked token.
    race = (off_hub * scale).sub_(noise).clamp_(min=LOWEST)

    # Take out the hubs. `max` returns the lowest index of a tie; `topk` promises nothing.
    hub_logits = []
    hub_tokens = []
    for rank in range(max_children - 1):
        # [num_rows, 1]
        value, token = off_hub.max(dim=1, keepdim=True)
        is_hub = rank < last_slot
        off_hub = off_hub.scatter(1, token, value.masked_fill(is_hub, -torch.inf))
        race.scatter_(1, token, race.gather(1, token).masked_fill_(is_hub, -torch.inf))
        hub_logits.append(value.masked_fill(~is_hub, -torch.inf))
        hub_tokens.append(token.masked_fill(~is_hub, -1))
    sampled = race.argmax(dim=1, keepdim=True)

    tokens = torch.full(
        (logits.shape[0], max_children), -1, dtype=torch.int64, device=logits.device
    )
    sample_slot = last_slot.long()
    if max_children > 1:
        # [num_rows, max_children - 1]
        rank = torch.arange(max_children - 1, device=logits.device)
        slot = rank.expand(logits.shape[0], -1)
        hubs = torch.cat(hub_tokens, dim=1)
        if ordered:
            # Weights of the labels: the hubs by rank, then everything off the hubs. A row with one
            # child has no hub, and its label is the sampled child.
            peak = hub_logits[0].clamp(min=LOWEST)
            hub_weight = torch.exp((torch.cat(hub_logits, dim=1) - peak) * scale)
            off_hub_weight = torch.exp((off_hub - peak) * scale).sum(dim=1, keepdim=True)
            threshold = hub_weight.cumsum(dim=1)
            key = rng.row_key(seeds[req], root_positions, node_ids, rng.LABEL)
            draw = rng.uniform(key).unsqueeze(1) * (threshold[:, -1:] + off_hub_weight)
            draw.masked_fill_(greedy, 0.0)
            # [num_rows, 1]: rank of the hub in slot 0; last_slot where the sampled child is.
            main = ((threshold <= draw) & (rank < last_slot)).sum(dim=1, keepdim=True)
            slot = torch.where(rank == main, 0, rank + (rank < main))
            sample_slot = sample_slot.masked_fill(main == last_slot, 0)
        # Padding ranks write the -1 that is there already.
        tokens.scatter_(1, torch.where(rank < last_slot, slot, rank + 1), hubs)
    tokens.scatter_(1, sample_slot, sampled)

    undrafted = ~drafted.unsqueeze(1)
    tokens.masked_fill_(undrafted, -1)
    return tokens, sample_slot.masked_fill(undrafted, -1).squeeze(1).to(torch.int32)
