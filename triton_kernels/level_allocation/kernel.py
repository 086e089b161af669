# SPDX-License-Identifier: Apache-2.0
"""Level allocation in Triton: one pass over each row, split over its tokens; one program per row,
which finds the largest probabilities; one per request, which decides."""

import torch
import triton
import triton.language as tl

from .. import constants, lanes_device, rng
from ..arguments import GrownTrees, Requests
from ..child_sampling.kernel import NUM_WARPS, lane_sums_kernel, sample_acceptance, scales
from ..lanes_device import (
    ABSENT,
    LOWEST,
    PASS_WARPS,
    first_best,
    lane_logits,
    power,
    total_weight,
    without,
)
from ..rules import BUILTIN_RULES

_CONFIDENT = tl.constexpr(constants.CONFIDENT)
_FIRST_LOSS = tl.constexpr(constants.FIRST_SAMPLE_LOSS)
_LONE = tl.constexpr(constants.LONE_SAMPLE)
_SHARES = tuple(tl.constexpr(share) for share in constants.SAMPLE_SHARES)
_SHARE1, _SHARE2, _SHARE3 = _SHARES[1:]
_CHILDREN = tl.constexpr(constants.MAX_CHILDREN)
_NO_PLACE = tl.constexpr(2**31 - 1)


@triton.jit
def _top_shares_kernel(
    # [num_rows, _CHILDREN], written: the largest probabilities, 0 where a row masks every token
    shares_ptr,
    # [num_rows, 3, LANES]
    lanes_ptr,
    # [num_rows, vocab_size]
    logits_ptr,
    logits_stride,
    # [max_num_reqs]
    temperature_ptr,
    # [num_rows]
    req_idx_ptr,
    vocab_size,
    LANES: tl.constexpr,
    # at least as many as a lane has tokens
    PLACES: tl.constexpr,
):
    """Grid: (num_rows,)."""
    row = tl.program_id(0).to(tl.int64)
    req = tl.load(req_idx_ptr + row).to(tl.int64)
    if req >= 0:
        row_ptr = logits_ptr + row * logits_stride
        _, scale, _, highest = scales(temperature_ptr, req, 1.0)
        all_lanes, places = tl.arange(0, LANES), tl.arange(0, _CHILDREN)
        own_ptr = lanes_ptr + row * (3 * LANES) + all_lanes
        peaks = tl.where(all_lanes < vocab_size, tl.load(own_ptr), ABSENT)
        sums = tl.load(own_ptr + LANES)
        row_peak = tl.max(peaks, axis=0)
        possible = row_peak > LOWEST
        total = total_weight(peaks, sums, row_peak, scale)
        inverse = tl.where(possible, 1.0 / tl.where(possible, total, 1.0), 0.0)
        shares = tl.zeros([_CHILDREN], tl.float32)
        taken = tl.full([_CHILDREN], -1, tl.int32)
        for place in tl.static_range(_CHILDREN):
            logit = tl.max(peaks, axis=0)
            lane = first_best(peaks, all_lanes)
            values = lane_logits(row_ptr, lane, taken, vocab_size, PLACES, LANES)
            token = lane + LANES * first_best(values, tl.arange(0, PLACES))
            share = tl.where(logit > LOWEST, power(logit, row_peak, scale) * inverse, 0.0)
            shares = tl.where(places == place, share, shares)
            taken = tl.where(places == place, token, taken)
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
        tl.store(shares_ptr + row * _CHILDREN + places, shares)


@triton.jit
def _expected(
    # [WIDTH, _CHILDREN], by rank
    shares,
    # [WIDTH] each
    num_children,
    greedy,
    NEVER_HUBS: tl.constexpr,
    ALWAYS_HUBS: tl.constexpr,
    CONFIDENT_HUBS: tl.constexpr,
):
    """What each child of each node is expected to be accepted with, hubs by rank, then samples as
    they are drawn; 0 past the last. [WIDTH, _CHILDREN]"""
    places = tl.arange(0, _CHILDREN)[None, :]
    num_confident = tl.sum((shares > _CONFIDENT).to(tl.int32), axis=1)
    num_hubs = tl.maximum(tl.minimum(num_confident, CONFIDENT_HUBS), ALWAYS_HUBS)
    num_hubs = tl.minimum(num_hubs, num_children - NEVER_HUBS)
    num_hubs = tl.where(greedy, num_children, num_hubs)
    is_hub = places < num_hubs[:, None]
    off_hubs = tl.maximum(1.0 - tl.sum(tl.where(is_hub, shares, 0.0), axis=1), 0.0)
    expected = sample_acceptance(off_hubs[:, None], places - num_hubs[:, None])
    best = tl.sum(tl.where(places == 0, shares, 0.0), axis=1)
    lone = (num_children == 1) & (num_hubs == 0)
    lone_share = best * best * (1.0 - _LONE) + _LONE
    expected = tl.where(lone[:, None], lone_share[:, None], expected)
    expected = tl.where(is_hub, shares, expected)
    return tl.where(places < num_children[:, None], expected, 0.0)


@triton.jit
def _allocate_kernel(
    # [max_num_reqs, num_tree_nodes] each, written: of the level's nodes
    first_child_ptr,
    num_children_ptr,
    # of their children
    parents_ptr,
    masks_ptr,
    reach_ptr,
    # [num_reqs * width, _CHILDREN]
    shares_ptr,
    # [max_num_reqs]
    temperature_ptr,
    # [num_reqs]
    req_idx_ptr,
    num_tree_nodes,
    first_node,
    width,
    width_below,
    # the values of `Hubs`
    NEVER_HUBS: tl.constexpr,
    ALWAYS_HUBS: tl.constexpr,
    CONFIDENT_HUBS: tl.constexpr,
    RANKED: tl.constexpr,
    # the most children of a node
    MOST: tl.constexpr,
    # at least the level's width
    WIDTH: tl.constexpr,
):
    """Grid: (num_reqs,)."""
    out = tl.program_id(0).to(tl.int64)
    req = tl.load(req_idx_ptr + out).to(tl.int64)
    if req >= 0:
        rows, places = tl.arange(0, WIDTH), tl.arange(0, _CHILDREN)
        inside = rows < width
        nodes = req * num_tree_nodes + first_node + rows
        at_share = ((out * width + rows) * _CHILDREN)[:, None] + places[None, :]
        shares = tl.load(shares_ptr + at_share, mask=inside[:, None], other=0.0)
        reach = tl.load(reach_ptr + nodes, mask=inside, other=0.0)
        best = tl.sum(tl.where(places[None, :] == 0, shares, 0.0), axis=1)
        # A row without any possible token is drafted as a greedy one.
        greedy = tl.where(tl.load(temperature_ptr + req) == 0.0, 0.0, best) == 0.0

        # What each further child adds, which never rises; -1 where there can be none.
        gains = tl.full([WIDTH, _CHILDREN], -1.0, tl.float32)
        highest = tl.zeros([WIDTH], tl.float32)
        falling = tl.full([WIDTH], float("inf"), tl.float32)
        for k in tl.static_range(1, MOST + 1):
            count = tl.full([WIDTH], k, tl.int32)
            expected = _expected(shares, count, greedy, NEVER_HUBS, ALWAYS_HUBS, CONFIDENT_HUBS)
            value = tl.sum(expected, axis=1)
            falling = tl.minimum(falling, tl.maximum(value - highest, 0.0))
            highest = tl.maximum(highest, value)
            gain = tl.where(inside, reach * falling, -1.0)
            gains = tl.where(places[None, :] == k - 1, gain[:, None], gains)

        count = tl.zeros([WIDTH], tl.int32)
        index = rows[:, None] * _CHILDREN + places[None, :]
        for _ in range(width_below):
            top = tl.max(tl.max(gains, axis=1), axis=0)
            best_index = tl.where(gains == top, index, _NO_PLACE)
            chosen = tl.min(tl.min(best_index, axis=1), axis=0)
            gains = tl.where(index == chosen, -2.0, gains)
            count += (rows == chosen // _CHILDREN).to(tl.int32)

        first = first_node + width + tl.cumsum(count, axis=0) - count
        tl.store(first_child_ptr + nodes, first, mask=inside)
        tl.store(num_children_ptr + nodes, count, mask=inside)
        expected = _expected(shares, count, greedy, NEVER_HUBS, ALWAYS_HUBS, CONFIDENT_HUBS)
        mask = tl.load(masks_ptr + nodes, mask=inside, other=0)
        for place in tl.static_range(MOST):
            # the child that is in this place, and its slot
            own = tl.sum(tl.where(places[None, :] == place, expected, 0.0), axis=1)
            slot = tl.full([WIDTH], place, tl.int32)
            if RANKED:
                ahead = expected > own[:, None]
                ahead |= (expected == own[:, None]) & (places[None, :] < place)
                ahead &= places[None, :] < count[:, None]
                slot = tl.sum(ahead.to(tl.int32), axis=1)
            child = first + slot
            present = place < count
            below = req * num_tree_nodes + child
            tl.store(parents_ptr + below, first_node + rows, mask=present)
            bit = tl.full([WIDTH], 1, tl.int64) << child.to(tl.int64)
            tl.store(masks_ptr + below, mask | bit, mask=present)
            tl.store(reach_ptr + below, reach * own, mask=present)


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
    """`level_allocation.allocate_children` on the GPU, without argument checks."""
    traits = BUILTIN_RULES[rule]
    never, always, confident = traits.hubs.value
    num_rows, vocab_size = logits.shape
    if num_rows == 0:
        return
    shares = torch.empty(num_rows, constants.MAX_CHILDREN, device=logits.device)
    lanes = torch.empty(num_rows, 3, rng.LANES, device=logits.device)
    req_idx = requests.req_idx.unsqueeze(1).expand(-1, width).flatten()
    lane_sums_kernel[(lanes_device.SPLITS, num_rows)](
        lanes,
        # nothing is kept
        logits,
        0,
        0,
        req_idx,
        logits,
        logits.stride(0),
        requests.temperature,
        req_idx,
        vocab_size,
        1.0,
        SHARPENED=False,
        KEPT=False,
        LANES=rng.LANES,
        SPLITS=lanes_device.SPLITS,
        num_warps=PASS_WARPS,
    )
    _top_shares_kernel[(num_rows,)](
        shares,
        lanes,
        logits,
        logits.stride(0),
        requests.temperature,
        req_idx,
        vocab_size,
        LANES=rng.LANES,
        PLACES=triton.next_power_of_2(triton.cdiv(vocab_size, rng.LANES)),
        num_warps=NUM_WARPS,
    )
    _allocate_kernel[(len(requests.req_idx),)](
        trees.tables.first_child,
        trees.tables.num_children,
        trees.tables.parents,
        trees.ancestor_masks,
        trees.reach,
        shares,
        requests.temperature,
        requests.req_idx,
        trees.tables.num_nodes,
        first_node,
        width,
        width_below,
        NEVER_HUBS=never,
        ALWAYS_HUBS=always,
        CONFIDENT_HUBS=confident,
        RANKED=traits.ranks_subtrees,
        MOST=min(constants.MAX_CHILDREN, width_below),
        WIDTH=triton.next_power_of_2(width),
        num_warps=1,
    )
