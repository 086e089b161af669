# SPDX-License-Identifier: Apache-2.0
"""Tree verification in Triton: the chances of all nodes, level by level, then one walk for each
request.

`_visit_kernel` is `node.node_outcome` for one node of one request: a pass over its two rows for
their sums, and one for every sample. What a node is visited with is its parent's doing, so from
leaf to root a level waits for the one above; from root to leaf all nodes run at once.
`_walk_kernel` tosses the coins, and draws the last token.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .. import rng
from ..arguments import Drafts, Requests, TargetRows, TreeTables, VerifiedPaths
from ..lanes_device import (
    HIGHEST,
    LOWEST,
    MAX_CHILDREN,
    at,
    draw_lane,
    draw_place,
    first_best,
    is_any,
    lane_index,
    lane_sums,
    load_logits,
    total_weight,
    without,
)
from ..rng_device import ACCEPT, RESIDUAL, row_key, uniform
from ..rules import BUILTIN_RULES

NUM_WARPS = 16
MAX_REGISTERS = 128
"""All that a thread can have. Left to choose, the compiler takes 64 here and spills."""

STATISTICS = 4
"""What is kept of a node's rows: the target's peak and inverse sum, the draft's peak, and its
weight."""

_STATISTICS = tl.constexpr(STATISTICS)
_NO_TURN = tl.constexpr(2 * 4)


@triton.jit
def _ratio(numerator, denominator):
    """min(1, numerator / denominator), and 0 for 0 / 0: what has no mass is not accepted."""
    enough = numerator >= denominator
    quotient = numerator / tl.where(enough, 1.0, denominator)
    return tl.where(enough, tl.where(numerator > 0.0, 1.0, 0.0), quotient)


@triton.jit
def _log_add(first, second):
    """log(exp(first) + exp(second)), where either may be far below any logit."""
    peak = tl.maximum(first, second)
    return peak + tl.log(tl.exp(first - peak) + tl.exp(second - peak))


@triton.jit
def _residual(target, draft, p, q):
    """(a p - w q)+ of some tokens, from their logits; p and q say peak, factor and scale of
    each."""
    owed = p[1] * tl.exp((target - p[0]) * p[2])
    spent = q[1] * tl.exp((draft - q[0]) * q[2])
    return tl.maximum(owed - tl.where(q[1] > 0.0, spent, 0.0), 0.0)


@triton.jit
def _lane_residual(
    # [vocab_size] each
    target_ptr,
    draft_ptr,
    lane,
    # [MAX_CHILDREN]
    children,
    p,
    q,
    vocab_size,
    PLACES: tl.constexpr,
    LANES: tl.constexpr,
):
    """What the tokens of a lane have left, 0 for children. [PLACES]"""
    index = lane_index(lane, PLACES, LANES)
    target = load_logits(target_ptr, index, vocab_size)
    left = _residual(target, load_logits(draft_ptr, index, vocab_size), p, q)
    return tl.where(is_any(index, children) | (index >= vocab_size), 0.0, left)


@triton.jit
def _residual_lanes(
    # [vocab_size] each
    target_ptr,
    draft_ptr,
    # [MAX_CHILDREN]
    children,
    p,
    q,
    vocab_size,
    PLACES: tl.constexpr,
    LANES: tl.constexpr,
):
    """What every lane has left off the children, [LANES]: one pass over both rows."""
    lanes = tl.arange(0, LANES)
    left = tl.zeros([LANES], tl.float32)
    for start in range(0, vocab_size, LANES):
        index = start + lanes
        target = load_logits(target_ptr, index, vocab_size)
        draft = load_logits(draft_ptr, index, vocab_size)
        left += tl.where(index < vocab_size, _residual(target, draft, p, q), 0.0)
    slots = tl.arange(0, MAX_CHILDREN)
    for slot in tl.static_range(MAX_CHILDREN):
        child = at(children, slots, slot)
        if child >= 0:
            lane = child % LANES
            own = _lane_residual(
                target_ptr, draft_ptr, lane, children, p, q, vocab_size, PLACES, LANES
            )
            left = tl.where(lanes == lane, tl.sum(own, axis=0), left)
    return left


@triton.jit
def _best_token(
    # [vocab_size]
    row_ptr,
    vocab_size,
    LANES: tl.constexpr,
):
    """The lowest id of the largest logit."""
    lanes = tl.arange(0, LANES)
    best = load_logits(row_ptr, lanes, vocab_size)
    winner = lanes
    for start in range(LANES, vocab_size, LANES):
        value = load_logits(row_ptr, start + lanes, vocab_size)
        winner = tl.where(value > best, start + lanes, winner)
        best = tl.maximum(best, value)
    return first_best(best, winner)


@triton.jit
def _children(
    node,
    num_nodes,
    # [num_tree_nodes] each
    first_child_ptr,
    num_children_ptr,
):
    """A node's first child, and how many there are. A node that lost one to truncation has none."""
    first = tl.load(first_child_ptr + node)
    count = tl.load(num_children_ptr + node)
    return first, tl.where(first + count - 1 <= num_nodes, count, 0)


@triton.jit
def _visit_kernel(
    # [num_reqs, num_tree_nodes] each, written for the nodes' children and for the nodes
    visit_ptr,
    leave_ptr,
    # [num_reqs, num_tree_nodes, _STATISTICS], written for the nodes
    statistics_ptr,
    # [num_rows, vocab_size]
    target_logits_ptr,
    target_logits_stride,
    # [max_num_reqs]
    target_temperature_ptr,
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
    sampled_ptr,
    sampled_stride,
    # [num_reqs]
    req_idx_ptr,
    # [max_num_reqs]
    draft_temperature_ptr,
    # [num_tree_nodes] each
    first_child_ptr,
    num_children_ptr,
    internal_index_ptr,
    # the first node of the level; there is a program for each
    first_node,
    num_tree_nodes,
    vocab_size,
    sharpening,
    LEAF_TO_ROOT: tl.constexpr,
    REPLACES: tl.constexpr,
    LANES: tl.constexpr,
    # at least as many as a lane has tokens
    PLACES: tl.constexpr,
):
    out = tl.program_id(0).to(tl.int64)
    node = first_node + tl.program_id(1)
    visit_ptr += out * num_tree_nodes
    leave_ptr += out * num_tree_nodes
    acceptance = tl.full([], 1.0, tl.float32)
    if LEAF_TO_ROOT:
        acceptance = tl.load(visit_ptr + node)
    first, count = _children(node, tl.load(num_nodes_ptr + out), first_child_ptr, num_children_ptr)
    tl.store(leave_ptr + node, acceptance)
    if (count > 0) & (acceptance > 0.0):
        req = tl.load(req_idx_ptr + out).to(tl.int64)
        row = tl.load(row_start_ptr + out).to(tl.int64)
        target_ptr = target_logits_ptr + (row + node) * target_logits_stride
        slots = tl.arange(0, MAX_CHILDREN)
        present = slots < count
        children = tl.load(node_tokens_ptr + row + first + slots, mask=present, other=-1)
        children = children.to(tl.int32)
        temperature = tl.load(target_temperature_ptr + req)
        if temperature == 0.0:
            best = _best_token(target_ptr, vocab_size, LANES)
            tl.store(visit_ptr + first + slots, (children == best).to(tl.float32), mask=present)
        else:
            internal = tl.load(internal_index_ptr + node).to(tl.int64)
            draft_ptr = (
                draft_logits_ptr
                + req * draft_logits_req_stride
                + internal * draft_logits_node_stride
            )
            bits = tl.load(sampled_ptr + req * sampled_stride + internal)
            draft_temperature = tl.load(draft_temperature_ptr + req)
            scale = sharpening / tl.where(draft_temperature == 0.0, 1.0, draft_temperature)
            visit, leave, statistics = _visit_children(
                target_ptr,
                draft_ptr,
                children,
                ((bits >> slots) & 1 == 1) & present,
                1.0 / temperature,
                scale,
                acceptance,
                vocab_size,
                REPLACES,
                PLACES,
                LANES,
            )
            tl.store(visit_ptr + first + slots, visit, mask=present)
            if LEAF_TO_ROOT:
                tl.store(leave_ptr + node, leave)
            statistics_ptr += (out * num_tree_nodes + node) * _STATISTICS
            tl.store(statistics_ptr, statistics[0])
            tl.store(statistics_ptr + 1, statistics[1])
            tl.store(statistics_ptr + 2, statistics[2])
            tl.store(statistics_ptr + 3, statistics[3])


@triton.jit
def _visit_children(
    # [vocab_size] each
    target_ptr,
    draft_ptr,
    # [MAX_CHILDREN], -1 past the last
    children,
    # [MAX_CHILDREN] bool
    sampled,
    target_scale,
    scale,
    acceptance,
    vocab_size,
    REPLACES: tl.constexpr,
    PLACES: tl.constexpr,
    LANES: tl.constexpr,
):
    """`node.node_outcome`: what every child is visited with, [MAX_CHILDREN], what the node is
    accepted with once they have failed, and the statistics from which its residual is made
    again."""
    slots = tl.arange(0, MAX_CHILDREN)
    present = children >= 0
    hub = present & (sampled == 0)
    token = tl.where(present, children, 0)
    peaks, sums = lane_sums(target_ptr, target_scale, vocab_size, LANES)
    target_peak = tl.max(peaks, axis=0)
    # A target that masks every token is token 0, which no pass over its row finds.
    possible = target_peak > LOWEST
    inverse = 1.0 / total_weight(peaks, sums, target_peak, target_scale)
    inverse = tl.where(possible, inverse, 0.0)
    # Children by slot: their share of the target, their draft logits, scaled
    share = inverse * tl.exp((_gather(target_ptr, token) - target_peak) * target_scale)
    share = tl.where(possible, share, (token == 0).to(tl.float32))
    owed = tl.where(present, acceptance * share, 0.0)
    logit = tl.minimum(_gather(draft_ptr, token) * scale, HIGHEST)
    owed_first = tl.where(possible | (tl.min(tl.where(present, children, 1)) == 0), 0.0, acceptance)
    first_logit = load_logits(draft_ptr, 0, vocab_size)
    # Of tokens that are held twice the first counts. [MAX_CHILDREN, MAX_CHILDREN]
    same = (children[:, None] == children[None, :]) & sampled[None, :]
    again = tl.max((same & (slots[None, :] < slots[:, None])).to(tl.int32), axis=1) > 0

    # The draft off all children. Where nothing is left, the peak is that of no token.
    peaks, sums = lane_sums(draft_ptr, scale, vocab_size, LANES)
    for slot in tl.static_range(MAX_CHILDREN):
        child = at(children, slots, slot)
        if slot == 0 or child >= 0:
            peaks, sums = without(
                draft_ptr, peaks, sums, child, children, scale, vocab_size, PLACES, LANES
            )
    draft_peak = tl.max(peaks, axis=0)
    top = tl.minimum(draft_peak * scale, HIGHEST)
    undrawn = top + tl.log(total_weight(peaks, sums, draft_peak, scale))
    undrawn = tl.where(draft_peak > LOWEST, undrawn, LOWEST)

    # Log-sum-exp of every slot's distribution: what was drawn is added back, the last first.
    log_sums = tl.zeros([MAX_CHILDREN], tl.float32)
    total = undrawn
    for backwards in tl.static_range(MAX_CHILDREN):
        slot = MAX_CHILDREN - 1 - backwards
        adds = (at(sampled.to(tl.int32), slots, slot) > 0) & (
            at(again.to(tl.int32), slots, slot) == 0
        )
        total = tl.where(adds, _log_add(total, at(logit, slots, slot)), total)
        log_sums = tl.where(slots == slot, total, log_sums)
    if REPLACES:
        log_sums = tl.zeros_like(log_sums) + total

    hub_mass = tl.sum(tl.where(hub, owed, 0.0), axis=0)
    lacking = 1.0 - acceptance
    p = (target_peak, acceptance * inverse, target_scale)
    visit = tl.zeros([MAX_CHILDREN], tl.float32)
    left = tl.full([], 1.0, tl.float32)
    kappa = tl.full([], 0.0, tl.float32)
    weight = tl.full([], 0.0, tl.float32)
    mass = tl.full([], 0.0, tl.float32)
    log_sum = at(log_sums, slots, 0)
    any_sample = tl.max(sampled.to(tl.int32), axis=0) > 0
    for slot in tl.static_range(MAX_CHILDREN):
        # without samples one sum is all that is needed
        is_sample = at(sampled.to(tl.int32), slots, slot) > 0
        if is_sample | ((slot == 0) & (any_sample == 0)):
            if is_sample:
                z, own_sum = at(logit, slots, slot), at(log_sums, slots, slot)
                chance = at(owed, slots, slot) - kappa * tl.exp(z - log_sum)
                chance = tl.where(
                    at(again.to(tl.int32), slots, slot) > 0, 0.0, tl.maximum(chance, 0.0)
                )
                visit = tl.where(slots == slot, _ratio(chance, left * tl.exp(z - own_sum)), visit)
                kappa = left + kappa * tl.exp(own_sum - log_sum)
                log_sum = own_sum
                weight = tl.where(undrawn > LOWEST, kappa * tl.exp(top - log_sum), 0.0)
            q = (draft_peak, weight, scale)
            lanes = _residual_lanes(
                target_ptr, draft_ptr, children, p, q, vocab_size, PLACES, LANES
            )
            # samples that have not been visited
            later = sampled & (slots > slot) & (again == 0)
            waiting = tl.maximum(owed - kappa * tl.exp(logit - log_sum), 0.0)
            mass = tl.sum(lanes, axis=0) + tl.sum(tl.where(later, waiting, 0.0), axis=0)
            mass += _residual(0.0, first_logit, (0.0, owed_first, 1.0), q)
            left = lacking + hub_mass + mass
    # Summed from the end: nothing cancels.
    owed_hubs = tl.where(hub, owed, 0.0)
    unvisited = tl.cumsum(owed_hubs, axis=0, reverse=True) + (lacking + mass)
    visit = tl.where(hub, _ratio(owed_hubs, unvisited), visit)
    # Nothing left is reached by rounding only, and then with acceptance 1.
    stuck = mass <= 0.0
    leave = tl.where(acceptance >= 1.0, 1.0, 0.0)
    leave = tl.where(stuck, leave, mass / tl.where(stuck, 1.0, lacking + mass))
    return visit, leave, (target_peak, inverse, draft_peak, weight)


@triton.jit
def _gather(
    # [vocab_size]
    row_ptr,
    # [MAX_CHILDREN], tokens of the vocabulary
    token,
):
    return load_logits(row_ptr, token, 2**31 - 1)


@triton.jit
def _next_slot(slot, bits, count):
    """The child that is visited after another: samples by slot, then hubs by slot. -1 before the
    first and after the last."""
    slots = tl.arange(0, MAX_CHILDREN)
    turns = tl.where((bits >> slots) & 1 == 1, slots, slots + MAX_CHILDREN)
    turn = tl.where(slot < 0, -1, at(turns, slots, slot))
    following = tl.min(tl.where((slots < count) & (turns > turn), turns, _NO_TURN), axis=0)
    return tl.where(following == _NO_TURN, -1, following % MAX_CHILDREN)


@triton.jit
def _draw_last(
    # [vocab_size] each; the draft's is not read for leaves
    target_ptr,
    draft_ptr,
    # [MAX_CHILDREN]
    children,
    # [_STATISTICS]
    statistics_ptr,
    has_children,
    acceptance,
    target_scale,
    scale,
    key,
    vocab_size,
    PLACES: tl.constexpr,
    LANES: tl.constexpr,
):
    """A draw from a node's residual; from the target at leaves, and where rounding left nothing."""
    peak = tl.full([], 0.0, tl.float32)
    factor = tl.full([], 1.0, tl.float32)
    draft_peak = tl.full([], 0.0, tl.float32)
    weight = tl.full([], 0.0, tl.float32)
    lanes = tl.zeros([LANES], tl.float32)
    if has_children:
        peak = tl.load(statistics_ptr)
        factor = acceptance * tl.load(statistics_ptr + 1)
        draft_peak = tl.load(statistics_ptr + 2)
        weight = tl.load(statistics_ptr + 3)
        lanes = _residual_lanes(
            target_ptr,
            draft_ptr,
            children,
            (peak, factor, target_scale),
            (draft_peak, weight, scale),
            vocab_size,
            PLACES,
            LANES,
        )
    if tl.max(lanes, axis=0) <= 0.0:
        peaks, sums = lane_sums(target_ptr, target_scale, vocab_size, LANES)
        peak = tl.max(peaks, axis=0)
        # nothing to draw from gives token 0
        factor = tl.where(peak > LOWEST, 1.0, 0.0)
        weight = tl.full([], 0.0, tl.float32)
        children = tl.full([MAX_CHILDREN], -1, tl.int32)
        draft_ptr = target_ptr
        lanes = factor * sums * tl.exp((peaks - peak) * target_scale)
    lane = draw_lane(lanes, key, 0, LANES)
    weights = _lane_residual(
        target_ptr,
        draft_ptr,
        lane,
        children,
        (peak, factor, target_scale),
        (draft_peak, weight, scale),
        vocab_size,
        PLACES,
        LANES,
    )
    return lane + LANES * draw_place(weights, key, 0, PLACES, LANES)


@triton.jit
def _walk_kernel(
    # [num_reqs, max_depth + 1]
    tokens_ptr,
    # [num_reqs]
    num_emitted_ptr,
    # [num_reqs, max_depth + 1]
    path_ptr,
    # [num_reqs, num_tree_nodes] each
    visit_ptr,
    leave_ptr,
    # [num_reqs, num_tree_nodes, _STATISTICS]
    statistics_ptr,
    # [num_rows, vocab_size]
    target_logits_ptr,
    target_logits_stride,
    # [max_num_reqs]
    target_temperature_ptr,
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
    sampled_ptr,
    sampled_stride,
    # [num_reqs]
    req_idx_ptr,
    # [max_num_reqs]
    draft_temperature_ptr,
    # [max_num_reqs]
    seeds_ptr,
    # [num_reqs]
    root_positions_ptr,
    # [num_tree_nodes] each
    first_child_ptr,
    num_children_ptr,
    internal_index_ptr,
    parents_ptr,
    max_depth,
    num_tree_nodes,
    vocab_size,
    sharpening,
    LEAF_TO_ROOT: tl.constexpr,
    LANES: tl.constexpr,
    PLACES: tl.constexpr,
):
    out = tl.program_id(0).to(tl.int64)
    visit_ptr += out * num_tree_nodes
    leave_ptr += out * num_tree_nodes
    req = tl.load(req_idx_ptr + out).to(tl.int64)
    row = tl.load(row_start_ptr + out).to(tl.int64)
    num_nodes = tl.load(num_nodes_ptr + out)
    seed = tl.load(seeds_ptr + req)
    position = tl.load(root_positions_ptr + out)
    sampled_ptr += req * sampled_stride

    # The slot that is visited next, below `node`: -1 to begin, and when all children have failed.
    node = tl.full([], 0, tl.int32)
    slot = tl.full([], -1, tl.int32)
    walking = tl.full([], 1, tl.int32)
    while walking != 0:
        first, count = _children(node, num_nodes, first_child_ptr, num_children_ptr)
        internal = tl.load(internal_index_ptr + node)
        bits = tl.load(sampled_ptr + internal, mask=count > 0, other=0)
        slot = _next_slot(slot, bits, count)
        if slot >= 0:
            child = first + slot
            chance = tl.load(visit_ptr + child)
            enter = chance > 0.0
            if not LEAF_TO_ROOT:
                enter = uniform(row_key(seed, position, child, ACCEPT)) < chance
            node = tl.where(enter, child, node)
            slot = tl.where(enter, -1, slot)
        elif LEAF_TO_ROOT:
            coin = uniform(row_key(seed, position, node, ACCEPT))
            # a leaf is left with what it was visited with
            leave = tl.load(tl.where(count > 0, leave_ptr, visit_ptr) + node)
            if (node == 0) | (coin < leave):
                walking = tl.zeros_like(walking)
            else:
                parent = tl.load(parents_ptr + node)
                slot = node - tl.load(first_child_ptr + parent)
                node = parent
        else:
            walking = tl.zeros_like(walking)

    first, count = _children(node, num_nodes, first_child_ptr, num_children_ptr)
    target_ptr = target_logits_ptr + (row + node) * target_logits_stride
    temperature = tl.load(target_temperature_ptr + req)
    token = tl.full([], 0, tl.int32)
    if temperature == 0.0:
        token = _best_token(target_ptr, vocab_size, LANES)
    else:
        slots = tl.arange(0, MAX_CHILDREN)
        children = tl.load(node_tokens_ptr + row + first + slots, mask=slots < count, other=-1).to(
            tl.int32
        )
        internal = tl.load(internal_index_ptr + node).to(tl.int64)
        draft_temperature = tl.load(draft_temperature_ptr + req)
        acceptance = tl.load(visit_ptr + node) if LEAF_TO_ROOT else 1.0
        token = _draw_last(
            target_ptr,
            draft_logits_ptr + req * draft_logits_req_stride + internal * draft_logits_node_stride,
            children,
            statistics_ptr + (out * num_tree_nodes + node) * _STATISTICS,
            count > 0,
            acceptance,
            1.0 / temperature,
            sharpening / tl.where(draft_temperature == 0.0, 1.0, draft_temperature),
            row_key(seed, position, node, RESIDUAL),
            vocab_size,
            PLACES,
            LANES,
        )

    depth = tl.full([], 0, tl.int32)
    above = node
    while above > 0:
        above = tl.load(parents_ptr + above)
        depth += 1
    tokens_ptr += out * (max_depth + 1)
    path_ptr += out * (max_depth + 1)
    tl.store(tokens_ptr + depth, token.to(tl.int64))
    tl.store(num_emitted_ptr + out, depth + 1)
    while depth > 0:
        tl.store(path_ptr + depth, node)
        tl.store(tokens_ptr + depth - 1, tl.load(node_tokens_ptr + row + node).to(tl.int64))
        node = tl.load(parents_ptr + node)
        depth -= 1
    tl.store(path_ptr, 0)


def verify_tree(
    target: TargetRows,
    drafts: Drafts,
    requests: Requests,
    tree: TreeTables,
    *,
    level_sizes: Sequence[int],
    rule: str,
    sharpening: float = 1.0,
) -> VerifiedPaths:
    """`verification.verify_tree` on the GPU, without argument checks."""
    traits = BUILTIN_RULES[rule]
    num_reqs, num_tree_nodes = len(target.row_start), len(tree.first_child)
    max_depth = len(level_sizes) - 1
    device, vocab_size = target.logits.device, target.logits.shape[1]
    paths = VerifiedPaths(
        torch.full((num_reqs, max_depth + 1), -1, dtype=torch.int64, device=device),
        torch.empty(num_reqs, dtype=torch.int32, device=device),
        torch.full((num_reqs, max_depth + 1), -1, dtype=torch.int32, device=device),
    )
    if num_reqs == 0:
        return paths
    # [num_reqs, num_tree_nodes]: nodes that are not written are never accepted
    visit = torch.zeros(num_reqs, num_tree_nodes, device=device)
    visit[:, 0] = 1.0
    leave = torch.empty_like(visit)
    statistics = torch.empty(num_reqs, num_tree_nodes, STATISTICS, device=device)
    rows = (
        target.logits,
        target.logits.stride(0),
        target.temperature,
        target.row_start,
        target.num_nodes,
        target.node_tokens,
        drafts.logits,
        drafts.logits.stride(0),
        drafts.logits.stride(1),
        drafts.sampled,
        drafts.sampled.stride(0),
        requests.req_idx,
        requests.temperature,
    )
    options = {
        "LEAF_TO_ROOT": traits.is_leaf_to_root,
        "LANES": rng.LANES,
        "PLACES": triton.next_power_of_2(triton.cdiv(vocab_size, rng.LANES)),
        "num_warps": NUM_WARPS,
        "maxnreg": MAX_REGISTERS,
    }
    # The deepest nodes are leaves. From root to leaf no node waits for another.
    inner_levels = level_sizes[:-1] if traits.is_leaf_to_root else [sum(level_sizes[:-1])]
    first = 0
    for count in inner_levels:
        _visit_kernel[(num_reqs, count)](
            visit,
            leave,
            statistics,
            *rows,
            tree.first_child,
            tree.num_children,
            tree.internal_index,
            first,
            num_tree_nodes,
            vocab_size,
            float(sharpening),
            REPLACES=traits.replaces,
            **options,
        )
        first += count
    _walk_kernel[(num_reqs,)](
        paths.tokens,
        paths.num_emitted,
        paths.path,
        visit,
        leave,
        statistics,
        *rows,
        requests.seeds,
        requests.root_positions,
        tree.first_child,
        tree.num_children,
        tree.internal_index,
        tree.parents,
        max_depth,
        num_tree_nodes,
        vocab_size,
        float(sharpening),
        **options,
    )
    return paths
