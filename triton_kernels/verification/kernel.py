# SPDX-License-Identifier: Apache-2.0
"""Tree verification in Triton: one program per request, which reads the rows on its walk only."""

import torch
import triton
import triton.language as tl

from ..rng_device import ACCEPT, RESIDUAL, element_hash, exponential, row_key, uniform

# Stands for the peak of logits that are all -inf.
_LOWEST = tl.constexpr(-3.0e38)
_NO_INDEX = tl.constexpr(2**31 - 1)
_MAX_CHILDREN = tl.constexpr(4)
_NO_SLOT = tl.constexpr(4)

BLOCK_SIZE = 2048
NUM_WARPS = 16


@triton.jit
def _best(value, index):
    """The index of the largest value over lanes, the lowest of a tie."""
    best = tl.max(value, axis=0)
    return tl.min(tl.where(value == best, index, _NO_INDEX), axis=0)


@triton.jit
def _accumulate(logit, peak, total, scale):
    """One step of a lane's running maximum and sum of exponentials."""
    higher = tl.maximum(peak, logit)
    total = total * tl.exp((peak - higher) * scale) + tl.exp((logit - higher) * scale)
    return higher, total


@triton.jit
def _ratio(numerator, denominator):
    """min(1, numerator / denominator), and 0 for 0 / 0: what has no mass is not accepted."""
    enough = numerator >= denominator
    ratio = numerator / tl.where(enough, 1.0, denominator)
    return tl.where(enough, tl.where(numerator > 0.0, 1.0, 0.0), ratio)


@triton.jit
def _emit(
    # [vocab_size]
    logits_ptr,
    vocab_size,
    key,
    scale,
    greedy,
    BLOCK_SIZE: tl.constexpr,
):
    """The best token of a row, or a draw from it."""
    lane = tl.arange(0, BLOCK_SIZE)
    race = tl.full([BLOCK_SIZE], float("-inf"), tl.float32)
    winner = lane
    for start in range(0, vocab_size, BLOCK_SIZE):
        index = start + lane
        logit = tl.load(logits_ptr + index, mask=index < vocab_size, other=float("-inf"))
        score = logit.to(tl.float32) * scale
        if not greedy:
            score -= tl.log(exponential(element_hash(key, index)))
        ahead = score > race
        race = tl.where(ahead, score, race)
        winner = tl.where(ahead, index, winner)
    return _best(race, winner)


@triton.jit
def _verify_node(
    # [vocab_size]
    target_ptr,
    # [vocab_size]
    draft_ptr,
    # [_MAX_CHILDREN]
    children,
    sample_slot,
    target_scale,
    draft_temperature,
    vocab_size,
    accept_key,
    residual_key,
    ORDERED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The accepted slot, or _NO_SLOT, and the token to emit in that case.

    The mathematics are `reference.draft_law` and `reference.node_outcome`.
    """
    lane = tl.arange(0, BLOCK_SIZE)
    slots = tl.arange(0, _MAX_CHILDREN)
    greedy_draft = draft_temperature == 0.0
    draft_scale = 1.0 / tl.where(greedy_draft, 1.0, draft_temperature)
    is_sample = slots == sample_slot
    is_hub = (children >= 0) & (slots != sample_slot)
    sample = tl.sum(tl.where(is_sample, children, 0), axis=0)
    hub0 = tl.sum(tl.where((slots == 0) & is_hub, children + 1, 0), axis=0) - 1
    hub1 = tl.sum(tl.where((slots == 1) & is_hub, children + 1, 0), axis=0) - 1
    hub2 = tl.sum(tl.where((slots == 2) & is_hub, children + 1, 0), axis=0) - 1
    hub3 = tl.sum(tl.where((slots == 3) & is_hub, children + 1, 0), axis=0) - 1

    # First pass: peaks and sums, of the target and of the draft off the hubs.
    target_peaks = tl.full([BLOCK_SIZE], _LOWEST, tl.float32)
    draft_peaks = target_peaks
    target_total = tl.zeros([BLOCK_SIZE], tl.float32)
    draft_total = target_total
    for start in range(0, vocab_size, BLOCK_SIZE):
        index = start + lane
        valid = index < vocab_size
        logit = tl.load(target_ptr + index, mask=valid, other=float("-inf")).to(tl.float32)
        target_peaks, target_total = _accumulate(logit, target_peaks, target_total, target_scale)
        hub = (index == hub0) | (index == hub1) | (index == hub2) | (index == hub3)
        logit = tl.load(draft_ptr + index, mask=valid & ~hub, other=float("-inf")).to(tl.float32)
        draft_peaks, draft_total = _accumulate(logit, draft_peaks, draft_total, draft_scale)
    target_peak = tl.max(target_peaks, axis=0)
    target_total *= tl.exp((target_peaks - target_peak) * target_scale)
    target_sum = tl.sum(target_total, axis=0)
    draft_peak = tl.max(draft_peaks, axis=0)
    draft_total *= tl.exp((draft_peaks - draft_peak) * draft_scale)
    # Nothing off the hubs, or a greedy draft: the sampled child was certain.
    certain = greedy_draft | (draft_peak == _LOWEST)
    draft_sum = tl.where(certain, 1.0, tl.sum(draft_total, axis=0))

    # The masses on and off the hubs, neither computed as 1 minus the other.
    hub_mass = 0.0
    off_hub_mass = 1.0
    hub_probs = tl.zeros([_MAX_CHILDREN], tl.float32)
    if ORDERED:
        hub_logits = tl.load(draft_ptr + children, mask=is_hub, other=float("-inf"))
        hub_logits = hub_logits.to(tl.float32)
        peak = tl.maximum(tl.max(hub_logits, axis=0), draft_peak)
        hub_probs = tl.exp((hub_logits - peak) * draft_scale)
        off_hub_mass = tl.where(certain, 0.0, draft_sum * tl.exp((draft_peak - peak) * draft_scale))
        # A greedy draft's law is a point mass on the first child.
        hub_probs = tl.where(greedy_draft, tl.where((slots == 0) & is_hub, 1.0, 0.0), hub_probs)
        # Without hubs all the mass is off them.
        off_hub_mass = tl.where(tl.sum(is_hub.to(tl.int32), axis=0) == 0, 1.0, off_hub_mass)
        hub_mass = tl.sum(hub_probs, axis=0)
        mass = hub_mass + off_hub_mass
        hub_probs /= mass
        hub_mass /= mass
        off_hub_mass /= mass

    # Second pass: the masses left to the residual and to the hubs, and the residual's race.
    residual_mass = tl.zeros([BLOCK_SIZE], tl.float32)
    unclaimed = residual_mass
    race = residual_mass
    winner = lane
    for start in range(0, vocab_size, BLOCK_SIZE):
        index = start + lane
        valid = index < vocab_size
        hub = (index == hub0) | (index == hub1) | (index == hub2) | (index == hub3)
        off_hub = valid & ~hub
        logit = tl.load(target_ptr + index, mask=off_hub, other=float("-inf")).to(tl.float32)
        p = tl.exp((logit - target_peak) * target_scale) / target_sum
        logit = tl.load(draft_ptr + index, mask=off_hub, other=float("-inf")).to(tl.float32)
        w = tl.exp((logit - draft_peak) * draft_scale) / draft_sum
        w = tl.where(certain, tl.where(index == sample, 1.0, 0.0), w)
        residual = tl.maximum(p - w, 0.0)
        residual_mass += residual
        if ORDERED:
            claimed = tl.maximum(p - off_hub_mass * w, 0.0)
            unclaimed += tl.maximum(hub_mass * w - claimed, 0.0)
        score = residual / exponential(element_hash(residual_key, index))
        ahead = score > race
        race = tl.where(ahead, score, race)
        winner = tl.where(ahead, index, winner)
    emitted_mass = tl.sum(residual_mass, axis=0)
    token = _best(race, winner)

    hub_target = tl.load(target_ptr + children, mask=is_hub, other=float("-inf")).to(tl.float32)
    hub_target = tl.exp((hub_target - target_peak) * target_scale) / target_sum
    sample_target = tl.load(target_ptr + sample).to(tl.float32)
    sample_target = tl.exp((sample_target - target_peak) * target_scale) / target_sum
    sample_draft = tl.load(draft_ptr + sample).to(tl.float32)
    sample_draft = tl.exp((sample_draft - draft_peak) * draft_scale) / draft_sum
    sample_draft = tl.where(certain, 1.0, sample_draft)

    accept_main = 0.0
    hub_gain = hub_target
    if ORDERED:
        # Share of each hub in what the target leaves unclaimed: l_h.
        share = tl.sum(unclaimed, axis=0) * hub_probs / tl.where(hub_mass == 0.0, 1.0, hub_mass)
        as_main = off_hub_mass * sample_draft
        excess = tl.maximum(sample_target - as_main, 0.0)
        accept_sample = tl.where(
            sample_slot == 0,
            _ratio(sample_target, as_main),
            _ratio(excess, hub_mass * sample_draft),
        )
        accept_main = tl.sum(tl.where(slots == 0, _ratio(hub_target, share), 0.0), axis=0)
        hub_gain = tl.maximum(hub_target - share, 0.0)
    else:
        accept_sample = _ratio(sample_target, sample_draft)
    failed = 1.0 - accept_sample
    pool = failed * (1.0 - accept_main)
    pool_mass = tl.sum(hub_gain, axis=0) + emitted_mass
    # A pool without mass is reached by rounding only: accept the sampled child. If the target rules
    # that token out, emit from the target instead.
    stuck = pool_mass <= 0.0
    pool_scale = pool / tl.where(stuck, 1.0, pool_mass)
    accept = hub_gain * pool_scale + tl.where(slots == 0, failed * accept_main, 0.0)
    accept = tl.where(
        is_sample, accept_sample + tl.where(stuck & (sample_target > 0.0), pool, 0.0), accept
    )
    reject = tl.where(stuck & (sample_target <= 0.0), pool, emitted_mass * pool_scale)

    threshold = tl.cumsum(accept, axis=0)
    total = tl.max(threshold, axis=0) + reject
    # Slots passed over; all of them on rejection.
    slot = tl.sum((threshold <= uniform(accept_key) * total).to(tl.int32), axis=0)
    if stuck and slot == _NO_SLOT:
        token = _emit(target_ptr, vocab_size, residual_key, target_scale, False, BLOCK_SIZE)
    return slot, token


@triton.jit
def _verify_tree_kernel(
    # [num_reqs, max_depth + 1]
    tokens_ptr,
    # [num_reqs]
    num_emitted_ptr,
    # [num_reqs, max_depth + 1]
    path_ptr,
    # [num_rows, vocab_size]
    target_logits_ptr,
    target_logits_stride,
    # [num_reqs]
    row_start_ptr,
    # [num_reqs]
    num_nodes_ptr,
    # [num_rows]
    node_tokens_ptr,
    # [max_num_reqs, num_internal, vocab_size]
    draft_logits_ptr,
    draft_logits_req_stride,
    draft_logits_node_stride,
    # [max_num_reqs, num_internal]
    sample_slots_ptr,
    sample_slots_stride,
    # [num_reqs]
    req_idx_ptr,
    # [max_num_reqs]
    target_temperature_ptr,
    # [max_num_reqs]
    draft_temperature_ptr,
    # [max_num_reqs]
    seeds_ptr,
    # [num_reqs]
    root_positions_ptr,
    # [num_tree_nodes]
    first_child_ptr,
    # [num_tree_nodes]
    num_children_ptr,
    # [num_tree_nodes]
    internal_index_ptr,
    max_depth,
    vocab_size,
    ORDERED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    out = tl.program_id(0).to(tl.int64)
    tokens_ptr += out * (max_depth + 1)
    path_ptr += out * (max_depth + 1)
    req = tl.load(req_idx_ptr + out).to(tl.int64)
    root_row = tl.load(row_start_ptr + out).to(tl.int64)
    num_nodes = tl.load(num_nodes_ptr + out)
    temperature = tl.load(target_temperature_ptr + req)
    greedy = temperature == 0.0
    target_scale = 1.0 / tl.where(greedy, 1.0, temperature)
    draft_temperature = tl.load(draft_temperature_ptr + req)
    seed = tl.load(seeds_ptr + req)
    position = tl.load(root_positions_ptr + out)
    slots = tl.arange(0, _MAX_CHILDREN)

    node = tl.full([], 0, tl.int32)
    depth = tl.full([], 0, tl.int32)
    while node >= 0:
        tl.store(path_ptr + depth, node)
        first = tl.load(first_child_ptr + node)
        num_children = tl.load(num_children_ptr + node)
        # A node that lost a child to truncation is a leaf.
        num_children = tl.where(first + num_children - 1 <= num_nodes, num_children, 0)
        children = tl.load(
            node_tokens_ptr + root_row + first + slots, mask=slots < num_children, other=-1
        ).to(tl.int64)
        target_ptr = target_logits_ptr + (root_row + node) * target_logits_stride
        residual_key = row_key(seed, position, node, RESIDUAL)
        if greedy or num_children == 0:
            token = _emit(target_ptr, vocab_size, residual_key, target_scale, greedy, BLOCK_SIZE)
            slot = tl.min(tl.where(children == token, slots, _NO_SLOT), axis=0)
        else:
            internal = tl.load(internal_index_ptr + node).to(tl.int64)
            draft_ptr = (
                draft_logits_ptr
                + req * draft_logits_req_stride
                + internal * draft_logits_node_stride
            )
            slot, token = _verify_node(
                target_ptr,
                draft_ptr,
                children,
                tl.load(sample_slots_ptr + req * sample_slots_stride + internal),
                target_scale,
                draft_temperature,
                vocab_size,
                row_key(seed, position, node, ACCEPT),
                residual_key,
                ORDERED,
                BLOCK_SIZE,
            )
        accepted = tl.sum(tl.where(slots == slot, children, 0), axis=0)
        tl.store(tokens_ptr + depth, tl.where(slot < _NO_SLOT, accepted, token.to(tl.int64)))
        node = tl.where(slot < _NO_SLOT, first + slot, -1)
        depth += 1
    tl.store(num_emitted_ptr + out, depth)


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
    rule: str,
    sharpening: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`verification.verify_tree` on the GPU, without argument checks."""
    num_reqs = row_start.shape[0]
    device = target_logits.device
    tokens = torch.full((num_reqs, max_depth + 1), -1, dtype=torch.int64, device=device)
    path = torch.full((num_reqs, max_depth + 1), -1, dtype=torch.int32, device=device)
    num_emitted = torch.empty(num_reqs, dtype=torch.int32, device=device)
    if num_reqs:
        _verify_tree_kernel[(num_reqs,)](
            tokens,
            num_emitted,
            path,
            target_logits,
            target_logits.stride(0),
            row_start,
            num_nodes,
            node_tokens,
            draft_logits,
            draft_logits.stride(0),
            draft_logits.stride(1),
            sample_slots,
            sample_slots.stride(0),
            req_idx,
            target_temperature,
            draft_temperature,
            seeds,
            root_positions,
            first_child,
            num_children,
            internal_index,
            max_depth,
            vocab_size=target_logits.shape[1],
            ORDERED=rule == "ordered",
            BLOCK_SIZE=BLOCK_SIZE,
            num_warps=NUM_WARPS,
        )
    return tokens, num_emitted, path
