# SPDX-License-Identifier: Apache-2.0
"""Tree verification in plain PyTorch: what the kernel must reproduce, and the host version.

`draft_law` and `node_outcome` are the mathematics of one node, in the dtype of their arguments;
`verify_tree` walks all requests at once, level by level.
"""

from typing import NamedTuple

import torch

from .. import rng

MAX_CHILDREN = 4
# Stands for the peak of logits that are all -inf.
LOWEST = -3.0e38


class DraftLaw(NamedTuple):
    """The law that a node's children were drafted from, as far as verification needs it."""

    # [num_rows, vocab_size]: law of the sampled child, 0 at the hubs
    sample_probs: torch.Tensor
    # [num_rows, max_children]: the draft's probability of each hub, 0 in other slots
    hub_probs: torch.Tensor
    # [num_rows]: the draft's probability off the hubs
    off_hub_mass: torch.Tensor


class NodeOutcome(NamedTuple):
    """Weights of what happens at a node; a row's weights sum to 1 up to rounding."""

    # [num_rows, max_children]: probability of accepting each slot's child
    accept: torch.Tensor
    # [num_rows]: probability of accepting none
    reject: torch.Tensor
    # [num_rows, vocab_size]: unnormalised law of the token emitted on rejection
    residual: torch.Tensor


def _hub_index(
    # [num_rows, max_children]
    children: torch.Tensor,
    # [num_rows, 1]
    slot: torch.Tensor,
    # [num_rows, 1]
    sample: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which slots hold hubs, and an index to scatter at: the sampled child where no hub is."""
    is_hub = (children >= 0).scatter_(1, slot, False)
    return is_hub, torch.where(is_hub, children, sample)


def draft_law(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    # [num_rows]
    temperature: torch.Tensor,
    # [num_rows, max_children]
    children: torch.Tensor,
    # [num_rows]
    sample_slot: torch.Tensor,
) -> DraftLaw:
    """Recover the draft law of nodes from the logits and the tokens that were drafted.

    The hubs are the children outside `sample_slot`, never recomputed: a tie broken the other way
    would verify against a law that nothing was drafted from. The law off the hubs is a softmax of
    its own, so a confident draft, whose mass there rounds to nothing, loses no precision.

    Args:
        logits: float32 or float64; -inf for masked tokens.
        temperature: of the logits' dtype; 0 for a greedy draft.
        children: int64 tokens, -1 past a node's last child.
        sample_slot: int64, slot of the sampled child.
    """
    greedy = (temperature == 0).unsqueeze(1)
    scale = 1.0 / torch.where(greedy, 1.0, temperature.unsqueeze(1))
    slot = sample_slot.unsqueeze(1)
    sample = children.gather(1, slot)
    is_hub, index = _hub_index(children, slot, sample)

    # The law off the hubs. Where nothing is left there, and for a greedy draft, it is a point mass.
    hub_logits = logits.gather(1, index).masked_fill_(~is_hub, -torch.inf)
    kept = torch.where(is_hub, -torch.inf, logits.gather(1, index))
    off_hub = logits.scatter(1, index, kept)
    off_hub_peak = off_hub.amax(dim=1, keepdim=True).clamp(min=LOWEST)
    certain = greedy | (off_hub_peak == LOWEST)
    weight = off_hub.sub_(off_hub_peak).mul_(scale).exp_().masked_fill_(certain, 0.0)
    weight.scatter_add_(1, sample, certain.to(weight.dtype))
    off_hub_weight = weight.sum(dim=1, keepdim=True)
    weight.div_(off_hub_weight)

    # The masses on and off the hubs, neither computed as 1 minus the other.
    peak = torch.maximum(hub_logits.amax(dim=1, keepdim=True), off_hub_peak)
    hub_weight = torch.exp((hub_logits - peak) * scale)
    off_hub_weight.mul_(torch.exp((off_hub_peak - peak) * scale)).masked_fill_(certain, 0.0)
    # A greedy draft's law is a point mass on the first child.
    hub_weight.masked_fill_(greedy, 0.0)[:, :1].masked_fill_(greedy & is_hub[:, :1], 1.0)
    # Without hubs all the mass is off them.
    off_hub_weight.masked_fill_(~is_hub.any(dim=1, keepdim=True), 1.0)
    mass = hub_weight.sum(dim=1, keepdim=True) + off_hub_weight
    return DraftLaw(weight, hub_weight / mass, (off_hub_weight / mass).squeeze(1))


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """min(1, numerator / denominator), and 0 for 0 / 0: what has no mass is not accepted."""
    enough = numerator >= denominator
    return torch.where(
        enough, (numerator > 0).to(numerator.dtype), numerator / denominator.masked_fill(enough, 1)
    )


def node_outcome(
    # [num_rows, vocab_size]
    target_probs: torch.Tensor,
    law: DraftLaw,
    # [num_rows, max_children]
    children: torch.Tensor,
    # [num_rows]
    sample_slot: torch.Tensor,
    *,
    ordered: bool,
) -> NodeOutcome:
    """What verification does at nodes with children, as probabilities given the draft.

    With p the target, q the draft, H the hubs, Z = q off H, w = q / Z off H, x the sampled child:

    Unordered: accept x with min(1, p_x / w_x), else draw from (p - w)+ and accept a hub drawn.

    Ordered, with B = sum off H of ((1 - Z) w - (p - q)+)+ and l_h = B q_h / (1 - Z): where x is in
    slot 0, accept it with min(1, p_x / q_x). Otherwise accept x with
    min(1, (p_x - q_x)+ / ((1 - Z) w_x)), else the hub h in slot 0 with min(1, p_h / l_h). Whatever
    fails draws from (p_h - l_h)+ on H and (p - w)+ off H.

    The emitted token, accepted or residual, follows p exactly. Source: SpecHub (Sun et al., EMNLP
    2024, arXiv 2411.05289); several hubs and ordered slots were derived for this project.

    Args:
        target_probs: float32 or float64, p.
        law: of the same dtype, from `draft_law`.
        children: int64 tokens, -1 past a node's last child.
        sample_slot: int64, slot of the sampled child.
        ordered: the slot order that children were drafted in.
    """
    slot = sample_slot.unsqueeze(1)
    sample = children.gather(1, slot)
    is_hub, index = _hub_index(children, slot, sample)
    sample_target = target_probs.gather(1, sample)
    sample_draft = law.sample_probs.gather(1, sample)
    hub_target = target_probs.gather(1, index).masked_fill_(~is_hub, 0.0)

    residual = (target_probs - law.sample_probs).clamp_(min=0)
    residual.scatter_(1, index, residual.gather(1, index).masked_fill_(is_hub, 0.0))
    residual_mass = residual.sum(dim=1, keepdim=True)

    if ordered:
        off_hub_mass = law.off_hub_mass.unsqueeze(1)
        hub_mass = law.hub_probs.sum(dim=1, keepdim=True)
        # What p leaves of w to be matched by the hubs: B. Hubs add nothing, as w is 0 there.
        claimed = (target_probs - off_hub_mass * law.sample_probs).clamp_(min=0)
        unclaimed = (hub_mass * law.sample_probs).sub_(claimed).clamp_(min=0)
        unclaimed = unclaimed.sum(dim=1, keepdim=True)
        share = unclaimed * law.hub_probs / hub_mass.masked_fill(hub_mass == 0, 1.0)
        excess = sample_target - off_hub_mass * sample_draft
        accept_sample = torch.where(
            slot == 0,
            _ratio(sample_target, off_hub_mass * sample_draft),
            _ratio(excess.clamp_(min=0), hub_mass * sample_draft),
        )
        accept_main = _ratio(hub_target[:, :1], share[:, :1])
        hub_gain = (hub_target - share).clamp_(min=0)
    else:
        accept_sample = _ratio(sample_target, sample_draft)
        accept_main = torch.zeros_like(accept_sample)
        hub_gain = hub_target

    failed = 1.0 - accept_sample
    pool = failed * (1.0 - accept_main)
    pool_mass = hub_gain.sum(dim=1, keepdim=True) + residual_mass
    # A pool without mass is reached by rounding only: accept the sampled child. If the target rules
    # that token out, emit from the target instead.
    stuck = pool_mass <= 0
    possible = sample_target > 0
    pool_scale = pool / pool_mass.masked_fill(stuck, 1.0)
    accept = hub_gain * pool_scale
    accept[:, :1] += failed * accept_main
    accept.scatter_(1, slot, accept_sample + pool.masked_fill(~(stuck & possible), 0.0))
    reject = torch.where(stuck & ~possible, pool, residual_mass * pool_scale)
    residual = torch.where(stuck, target_probs, residual)
    return NodeOutcome(accept, reject.squeeze(1), residual)


def verify_tree(
    # [num_rows, vocab_size]
    target_logits: torch.Tensor,
    # [num_reqs]
    row_start: torch.Tensor,
    # [num_reqs]
    num_nodes: torch.Tensor,
    # [num_rows]
    node_tokens: torch.Tensor,
    # [max_num_reqs, num_internal, vocab_size]
    draft_logits: torch.Tensor,
    # [max_num_reqs, num_internal]
    sample_slots: torch.Tensor,
    # [num_reqs]
    req_idx: torch.Tensor,
    # [max_num_reqs]
    target_temperature: torch.Tensor,
    # [max_num_reqs]
    draft_temperature: torch.Tensor,
    # [max_num_reqs]
    seeds: torch.Tensor,
    # [num_reqs]
    root_positions: torch.Tensor,
    # [num_tree_nodes]
    first_child: torch.Tensor,
    # [num_tree_nodes]
    num_children: torch.Tensor,
    # [num_tree_nodes]
    internal_index: torch.Tensor,
    *,
    max_depth: int,
    ordered: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`verification.verify_tree` on any device, without argument checks."""
    device = target_logits.device
    num_reqs = row_start.shape[0]
    vocab_size = target_logits.shape[1]
    tokens = torch.full((num_reqs, max_depth + 1), -1, dtype=torch.int64, device=device)
    path = torch.full((num_reqs, max_depth + 1), -1, dtype=torch.int32, device=device)
    path[:, 0] = 0
    num_accepted = torch.zeros(num_reqs, dtype=torch.int64, device=device)
    residual = torch.empty(num_reqs, vocab_size, dtype=torch.float32, device=device)

    # [num_reqs, 1]
    greedy = (target_temperature[req_idx] == 0).unsqueeze(1)
    scale = 1.0 / torch.where(greedy, 1.0, target_temperature[req_idx].unsqueeze(1))
    req_seeds = seeds[req_idx]
    slots = torch.arange(MAX_CHILDREN, device=device)
    # [num_reqs, num_tree_nodes]
    draws = rng.uniform(
        rng.row_key(
            req_seeds.unsqueeze(1),
            root_positions.unsqueeze(1),
            torch.arange(first_child.shape[0], device=device),
            rng.ACCEPT,
        )
    )

    node = torch.zeros(num_reqs, dtype=torch.int64, device=device)
    # Requests still walking. All of these lose the requests that stop.
    walking = torch.arange(num_reqs, device=device)
    for depth in range(max_depth + 1):
        at = node[walking]
        logits = target_logits[row_start[walking] + at].to(torch.float32)
        target_probs = torch.softmax(logits * scale[walking], dim=1)
        row_greedy = greedy[walking]
        best = logits.argmax(dim=1, keepdim=True)
        target_probs.masked_fill_(row_greedy, 0.0)
        target_probs.scatter_add_(1, best, row_greedy.to(torch.float32))
        # What a leaf emits from.
        residual[walking] = target_probs

        first = first_child[at]
        count = num_children[at]
        internal = (count > 0) & (first + count - 1 <= num_nodes[walking])
        (kept,) = internal.nonzero(as_tuple=True)
        if kept.numel() == 0:
            break
        walking, at, first, count, row_greedy, best, target_probs = (
            value[kept] for value in (walking, at, first, count, row_greedy, best, target_probs)
        )
        child_rows = (row_start[walking] + first).unsqueeze(1) + slots
        present = slots < count.unsqueeze(1)
        children = node_tokens[child_rows.clamp_(max=node_tokens.shape[0] - 1)].long()
        children.masked_fill_(~present, -1)
        state = (req_idx[walking], internal_index[at])
        sample_slot = sample_slots[state].long()
        law = draft_law(
            draft_logits[state].to(torch.float32),
            draft_temperature[req_idx[walking]],
            children,
            sample_slot,
        )
        outcome = node_outcome(target_probs, law, children, sample_slot, ordered=ordered)
        # A greedy target accepts the child that holds its best token, whatever the draft.
        match = (children == best).to(torch.float32)
        accept = torch.where(row_greedy, match, outcome.accept)
        reject = torch.where(
            row_greedy, 1.0 - match.sum(dim=1, keepdim=True), outcome.reject.unsqueeze(1)
        )
        residual[walking] = torch.where(row_greedy, target_probs, outcome.residual)

        threshold = accept.cumsum(dim=1)
        draw = draws[walking, at].unsqueeze(1) * (threshold[:, -1:] + reject)
        # Slots passed over; all of them on rejection.
        slot = (threshold <= draw).sum(dim=1)
        (kept,) = (slot < MAX_CHILDREN).nonzero(as_tuple=True)
        if kept.numel() == 0:
            break
        walking, slot = walking[kept], slot[kept]
        child = first[kept] + slot
        node[walking] = child.long()
        tokens[walking, depth] = children[kept, slot]
        path[walking, depth + 1] = child.to(torch.int32)
        num_accepted[walking] += 1

    key = rng.row_key(req_seeds, root_positions, node, rng.RESIDUAL)
    noise = rng.exponential(rng.element_hash(key, vocab_size))
    last = residual.div_(noise).argmax(dim=1, keepdim=True)
    tokens.scatter_(1, num_accepted.unsqueeze(1), last)
    return tokens, num_accepted.to(torch.int32) + 1, path
