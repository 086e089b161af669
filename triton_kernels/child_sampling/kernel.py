# SPDX-License-Identifier: Apache-2.0
"""Child sampling in Triton: one pass over each row, split over its tokens, which also keeps the row
for verification; then one program per row, which reads a peak and a sum of every lane."""

import torch
import triton
import triton.language as tl

from .. import constants, lanes_device, rng
from ..arguments import Children, KeptRows, Requests
from ..lanes_device import (
    ABSENT,
    LOG2_E,
    LOWEST,
    PASS_WARPS,
    STEP,
    draw_lane,
    draw_place,
    first_best,
    lane_logits,
    lane_sums,
    limit,
    power,
    rescaled,
    tile_tokens,
    total_weight,
    without,
)
from ..rng_device import CHILD, DRAW_STRIDE, row_key
from ..rules import BUILTIN_RULES

NUM_WARPS = 4
"""Of a program that draws a row's children."""

_CONFIDENT = tl.constexpr(constants.CONFIDENT)
_FIRST_LOSS = tl.constexpr(constants.FIRST_SAMPLE_LOSS)
_SHARES = tuple(tl.constexpr(share) for share in constants.SAMPLE_SHARES)
_SHARE1, _SHARE2, _SHARE3 = _SHARES[1:]
_CHILDREN = tl.constexpr(constants.MAX_CHILDREN)


@triton.jit
def sample_acceptance(off_hubs, number):
    """What a sample is expected to be accepted with, by how many were drawn before."""
    share = tl.where(number == 1, _SHARE1, tl.where(number == 2, _SHARE2, _SHARE3))
    return off_hubs * tl.where(number == 0, 1.0 - _FIRST_LOSS * off_hubs, share)


@triton.jit
def _slots(
    # [_CHILDREN]
    expected,
    # [_CHILDREN]
    sampled,
    RANKED: tl.constexpr,
):
    """The slot of every child, [_CHILDREN]: by falling expectation, of a tie samples first."""
    place = tl.arange(0, _CHILDREN)
    if not RANKED:
        return place
    turn = tl.where(sampled, place, place + _CHILDREN)
    ahead = expected[None, :] > expected[:, None]
    ahead |= (expected[None, :] == expected[:, None]) & (turn[None, :] < turn[:, None])
    return tl.sum(ahead.to(tl.int32), axis=1)


@triton.jit
def scales(
    # [max_num_reqs]
    temperature_ptr,
    req,
    sharpening,
):
    """A request's temperature, the scale of its distribution, that of its samples', and the highest
    peak that both may be multiplied by."""
    temperature = tl.load(temperature_ptr + req)
    scale = LOG2_E / tl.where(temperature == 0.0, 1.0, temperature)
    draw_scale = scale * sharpening
    return temperature, scale, draw_scale, limit(tl.maximum(scale, draw_scale))


@triton.jit
def lane_sums_kernel(
    # [num_rows, 3, LANES], written: peaks, sums, and if SHARPENED the sums for samples
    lanes_ptr,
    # [max_num_reqs, num_internal, vocab_size], written if the rows are KEPT
    kept_ptr,
    kept_req_stride,
    kept_node_stride,
    # [num_rows]
    internal_ptr,
    # [num_rows, vocab_size]
    logits_ptr,
    logits_stride,
    # [max_num_reqs]
    temperature_ptr,
    # [num_rows]
    req_idx_ptr,
    vocab_size,
    sharpening,
    SHARPENED: tl.constexpr,
    KEPT: tl.constexpr,
    LANES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid: (SPLITS, num_rows). Greedy requests' rows are not kept: verification does not read
    them."""
    OWN: tl.constexpr = LANES // SPLITS
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    req = tl.load(req_idx_ptr + row).to(tl.int64)
    if req >= 0:
        row_ptr = logits_ptr + row * logits_stride
        temperature, scale, draw_scale, highest = scales(temperature_ptr, req, sharpening)
        peaks, sums = lane_sums(row_ptr, split * OWN, scale, highest, vocab_size, OWN, LANES)
        own_ptr = lanes_ptr + row * (3 * LANES) + split * OWN + tl.arange(0, OWN)
        tl.store(own_ptr, peaks)
        tl.store(own_ptr + LANES, sums)
        if SHARPENED:
            _, sums = lane_sums(row_ptr, split * OWN, draw_scale, highest, vocab_size, OWN, LANES)
            tl.store(own_ptr + 2 * LANES, sums)
        if KEPT and temperature != 0.0:
            internal = tl.load(internal_ptr + row).to(tl.int64)
            to_ptr = kept_ptr + req * kept_req_stride + internal * kept_node_stride
            for place in range(0, tl.cdiv(vocab_size, LANES), STEP):
                index = tile_tokens(split * OWN, place, OWN, LANES)
                value = tl.load(row_ptr + index, mask=index < vocab_size)
                tl.store(to_ptr + index, value, mask=index < vocab_size)


@triton.jit
def _sample_children_kernel(
    # [num_rows, MAX_CHILDREN]
    tokens_ptr,
    # [num_rows]
    sampled_ptr,
    # [num_rows, 3, LANES]
    lanes_ptr,
    # [num_rows, vocab_size]
    logits_ptr,
    logits_stride,
    # [max_num_reqs]
    temperature_ptr,
    # [max_num_reqs]
    seeds_ptr,
    # [num_rows]
    req_idx_ptr,
    # [num_rows]
    root_positions_ptr,
    # [num_rows]
    node_ids_ptr,
    # [num_rows]
    num_children_ptr,
    vocab_size,
    sharpening,
    # the values of `Hubs`
    NEVER_HUBS: tl.constexpr,
    ALWAYS_HUBS: tl.constexpr,
    CONFIDENT_HUBS: tl.constexpr,
    REPLACES: tl.constexpr,
    RANKED: tl.constexpr,
    MAX_CHILDREN: tl.constexpr,
    SHARPENED: tl.constexpr,
    LANES: tl.constexpr,
    # at least as many as a lane has tokens
    PLACES: tl.constexpr,
):
    """Grid: (num_rows,)."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    places = tl.arange(0, _CHILDREN)
    req = tl.load(req_idx_ptr + row).to(tl.int64)
    if req < 0:
        tl.store(tokens_ptr + row * MAX_CHILDREN + places, -1, mask=places < MAX_CHILDREN)
        tl.store(sampled_ptr + row, -1)
        return
    num_children = tl.load(num_children_ptr + row)
    temperature, scale, draw_scale, highest = scales(temperature_ptr, req, sharpening)
    key = row_key(
        tl.load(seeds_ptr + req),
        tl.load(root_positions_ptr + row),
        tl.load(node_ids_ptr + row),
        CHILD,
    )
    all_lanes = tl.arange(0, LANES)
    lanes_ptr += row * (3 * LANES) + all_lanes
    peaks = tl.where(all_lanes < vocab_size, tl.load(lanes_ptr), ABSENT)
    sums = tl.load(lanes_ptr + LANES)
    draw_sums = sums
    if SHARPENED:
        draw_sums = tl.load(lanes_ptr + 2 * LANES)
    row_peak = tl.max(peaks, axis=0)
    # A row without any possible token is drafted as a greedy one.
    greedy = (temperature == 0.0) | (row_peak == LOWEST)
    total = total_weight(peaks, sums, row_peak, scale)

    # [_CHILDREN] each: hubs by rank, then samples as they were drawn
    tokens = tl.full([_CHILDREN], -1, tl.int32)
    taken = tokens
    sampled = places < 0
    expected = tl.full([_CHILDREN], -1.0, tl.float32)
    num_hubs = tl.full([], 0, tl.int32)
    off_hubs = tl.full([], 1.0, tl.float32)
    for place in tl.static_range(MAX_CHILDREN):
        if place < num_children:
            logit = tl.max(peaks, axis=0)
            lane = first_best(peaks, all_lanes)
            values = lane_logits(row_ptr, lane, taken, vocab_size, PLACES, LANES)
            token = lane + LANES * first_best(values, tl.arange(0, PLACES))
            prob = power(logit, row_peak, scale) / total
            limit = tl.where(prob > _CONFIDENT, CONFIDENT_HUBS, ALWAYS_HUBS)
            hub = (place < tl.minimum(limit, num_children - NEVER_HUBS)) & (num_hubs == place)
            hub = hub | greedy
            # Where nothing is left to draw from, the next token was chosen without chance.
            drawn = (hub == 0) & (logit > LOWEST)
            if drawn:
                if num_hubs == place:
                    off_hubs = total_weight(peaks, sums, row_peak, scale) / total
                weights = draw_sums * rescaled(peaks, logit, draw_scale)
                first = place * DRAW_STRIDE
                lane, _ = draw_lane(weights, all_lanes, key, first)
                values = lane_logits(row_ptr, lane, taken, vocab_size, PLACES, LANES)
                peak = tl.minimum(tl.max(values, axis=0), highest)
                weights = power(values, peak, draw_scale)
                token = lane + LANES * draw_place(weights, key, first, PLACES, LANES)
                prob = sample_acceptance(off_hubs, place - num_hubs)
            num_hubs += hub.to(tl.int32)
            tokens = tl.where(places == place, token, tokens)
            sampled = sampled | ((places == place) & drawn)
            expected = tl.where(places == place, prob, expected)
            if (drawn == 0) | (not REPLACES):
                taken = tl.where(places == place, token, taken)
                if SHARPENED:
                    _, draw_sums = without(
                        row_ptr,
                        peaks,
                        draw_sums,
                        all_lanes,
                        token,
                        taken,
                        draw_scale,
                        highest,
                        vocab_size,
                        PLACES,
                        LANES,
                    )
                peaks, sums = without(
                    row_ptr,
                    peaks,
                    sums,
                    all_lanes,
                    token,
                    taken,
                    scale,
                    highest,
                    vocab_size,
                    PLACES,
                    LANES,
                )
                if not SHARPENED:
                    draw_sums = sums

    slots = _slots(expected, sampled, RANKED)
    slots = tl.where(greedy, places, slots)
    row_tokens_ptr = tokens_ptr + row * MAX_CHILDREN
    tl.store(row_tokens_ptr + slots, tokens.to(tl.int64), mask=places < MAX_CHILDREN)
    tl.store(sampled_ptr + row, tl.sum(sampled.to(tl.int32) << slots, axis=0))


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
    """`child_sampling.sample_children` on the GPU, without argument checks."""
    traits = BUILTIN_RULES[rule]
    never, always, confident = traits.hubs.value
    num_rows, vocab_size = logits.shape
    device = logits.device
    tokens = torch.empty(num_rows, max_children, dtype=torch.int64, device=device)
    sampled = torch.empty(num_rows, dtype=torch.int32, device=device)
    if num_rows == 0:
        return Children(tokens, sampled)
    lanes = torch.empty(num_rows, 3, rng.LANES, device=device)
    kept, internal = keep or (logits.unsqueeze(1), node_ids)
    sharpened = sharpening != 1.0
    lane_sums_kernel[(lanes_device.SPLITS, num_rows)](
        lanes,
        kept,
        kept.stride(0),
        kept.stride(1),
        internal,
        logits,
        logits.stride(0),
        requests.temperature,
        requests.req_idx,
        vocab_size,
        float(sharpening),
        SHARPENED=sharpened,
        KEPT=keep is not None,
        LANES=rng.LANES,
        SPLITS=lanes_device.SPLITS,
        num_warps=PASS_WARPS,
    )
    _sample_children_kernel[(num_rows,)](
        tokens,
        sampled,
        lanes,
        logits,
        logits.stride(0),
        requests.temperature,
        requests.seeds,
        requests.req_idx,
        requests.root_positions,
        node_ids,
        num_children,
        vocab_size,
        float(sharpening),
        NEVER_HUBS=never,
        ALWAYS_HUBS=always,
        CONFIDENT_HUBS=confident,
        REPLACES=traits.replaces,
        RANKED=traits.ranks_subtrees,
        MAX_CHILDREN=max_children,
        SHARPENED=sharpened,
        LANES=rng.LANES,
        PLACES=triton.next_power_of_2(triton.cdiv(vocab_size, rng.LANES)),
        num_warps=NUM_WARPS,
    )
    return Children(tokens, sampled)
