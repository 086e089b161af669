# SPDX-License-Identifier: Apache-2.0
"""Tree verification in Triton. Kernels that read rows are split over the vocabulary, and decide
nothing; kernels that decide read what those have added up.

1. `_statistics_kernel`: every node's rows, once: the largest logits and the sums off the children.
2. `_residual_kernel` adds up what is left of a node's target after its next sample has failed, and
   `_outcome_kernel` makes `node.node_outcome` of the sums, with which the node's children are
   visited. What a node is visited with is its parent's doing, so from leaf to root a level waits
   for the one above; from root to leaf all nodes run at once.
3. `_walk_kernel` tosses each request's coins.
4. `_race_kernel` lets the tokens of the last node's residual race, and `_last_token_kernel` takes
   the winner.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .. import lanes_device, rng
from ..arguments import Drafts, Requests, TargetRows, TreeTables, VerifiedPaths
from ..lanes_device import (
    HIGHEST,
    LOG2_E,
    LOWEST,
    MAX_CHILDREN,
    PASS_WARPS,
    ROWS,
    STAGES,
    STEP,
    at,
    draw_lane,
    draw_place,
    first_best,
    is_any,
    lane_index,
    lane_sums,
    limit,
    load_tile,
    owns,
    power,
    rescaled,
    tile_tokens,
    total_weight,
    whole_steps,
    without,
)
from ..rng_device import ACCEPT, RESIDUAL, row_key, uniform
from ..rules import BUILTIN_RULES, Rule

# Sums of a part of a row: the target's peak and sum, then the draft's. Of greedy requests the best
# logit and its token.
_SUMS = tl.constexpr(4)
# What is kept of a node: the target's peak, what its weights are multiplied by, the draft's peak
# and its factor, below 0 where the last token comes from the target. Of greedy requests the best
# token.
_RECORD = tl.constexpr(4)
# What a part of a row sends into the race: its best number and that one's lane, and the peak that
# its weights are relative to. Of greedy requests the best logit and its token.
_ENTRY = tl.constexpr(4)
_NO_TURN = tl.constexpr(2 * 4)
# Paths are made in one piece, and a tree mask has 64 bits.
_LONGEST_PATH = tl.constexpr(64)
_NO_TOKEN = tl.constexpr(2**31 - 1)
# Arguments for whose values nothing is compiled anew.
_HOST_NUMBERS = [
    "sampled_stride",
    "tree_stride",
    "first_node",
    "failed",
    "max_depth",
    "num_tree_nodes",
]


@triton.jit
def _ratio(numerator, denominator):
    """min(1, numerator / denominator), and 0 for 0 / 0: what has no mass is not accepted."""
    enough = numerator >= denominator
    quotient = numerator / tl.where(enough, 1.0, denominator)
    return tl.where(enough, tl.where(numerator > 0.0, 1.0, 0.0), quotient)


@triton.jit
def _log_add(first, second):
    """log2(2 ** first + 2 ** second), where either may be far below any logit."""
    peak = tl.maximum(first, second)
    return peak + tl.log2(tl.exp2(first - peak) + tl.exp2(second - peak))


@triton.jit
def _residual(target, draft, p, q):
    """(a p - w q)+ of some tokens, from their logits; p and q say peak, factor and scale of each.
    Equal bit by bit wherever it is computed."""
    spent = q[1] * power(draft, q[0], q[2])
    return tl.maximum(tl.fma(power(target, p[0], p[2]), p[1], -spent), 0.0)


@triton.jit
def _residual_step(
    # [vocab_size] each
    target_ptr,
    draft_ptr,
    first_lane,
    place,
    p,
    q,
    vocab_size,
    MASKED: tl.constexpr,
    OWN: tl.constexpr,
    LANES: tl.constexpr,
):
    """What OWN lanes have left in one step's places. [ROWS, OWN]"""
    target = load_tile(target_ptr, first_lane, place, vocab_size, MASKED, OWN, LANES)
    draft = load_tile(draft_ptr, first_lane, place, vocab_size, MASKED, OWN, LANES)
    return tl.sum(_residual(target, draft, p, q), axis=1)


@triton.jit
def _lane_residuals(
    # [vocab_size] each
    target_ptr,
    draft_ptr,
    first_lane,
    # [MAX_CHILDREN]
    children,
    p,
    q,
    vocab_size,
    OWN: tl.constexpr,
    LANES: tl.constexpr,
    PLACES: tl.constexpr,
):
    """What each of OWN lanes has left off the children, [OWN]: one pass over both rows."""
    left = tl.zeros([ROWS, OWN], tl.float32)
    whole = whole_steps(vocab_size, LANES)
    for place in tl.range(0, whole, STEP, num_stages=STAGES):
        left += _residual_step(
            target_ptr, draft_ptr, first_lane, place, p, q, vocab_size, False, OWN, LANES
        )
    if whole * LANES < vocab_size:
        left += _residual_step(
            target_ptr, draft_ptr, first_lane, whole, p, q, vocab_size, True, OWN, LANES
        )
    left = tl.sum(left, axis=0)
    slots, lanes = tl.arange(0, MAX_CHILDREN), first_lane + tl.arange(0, OWN)
    for slot in tl.static_range(MAX_CHILDREN):
        child = at(children, slots, slot)
        if owns(first_lane, child, OWN, LANES):
            lane = child % LANES
            own = _place_residuals(
                target_ptr, draft_ptr, lane, children, p, q, vocab_size, PLACES, LANES
            )
            left = tl.where(lanes == lane, tl.sum(own, axis=0), left)
    return left


@triton.jit
def _place_residuals(
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
    inside = (index < vocab_size) & (is_any(index, children) == 0)
    target = tl.load(target_ptr + index, mask=inside, other=float("-inf")).to(tl.float32)
    draft = tl.load(draft_ptr + index, mask=inside, other=float("-inf")).to(tl.float32)
    return _residual(target, draft, p, q)


@triton.jit
def _sums_off(
    # [vocab_size]
    row_ptr,
    first_lane,
    # [MAX_CHILDREN]
    children,
    scale,
    vocab_size,
    OWN: tl.constexpr,
    LANES: tl.constexpr,
    PLACES: tl.constexpr,
):
    """The peak of OWN lanes off the children, LOWEST if no token is possible, and what their powers
    of 2 relative to it add up to."""
    highest = limit(scale)
    peaks, sums = lane_sums(row_ptr, first_lane, scale, highest, vocab_size, OWN, LANES)
    slots, lanes = tl.arange(0, MAX_CHILDREN), first_lane + tl.arange(0, OWN)
    for slot in tl.static_range(MAX_CHILDREN):
        child = at(children, slots, slot)
        if owns(first_lane, child, OWN, LANES):
            peaks, sums = without(
                row_ptr,
                peaks,
                sums,
                lanes,
                child,
                children,
                scale,
                highest,
                vocab_size,
                PLACES,
                LANES,
            )
    peak = tl.maximum(tl.max(peaks, axis=0), LOWEST)
    return peak, total_weight(peaks, sums, peak, scale)


@triton.jit
def _better(
    # [ROWS, OWN] each
    best,
    winner,
    # [vocab_size]
    row_ptr,
    first_lane,
    place,
    vocab_size,
    MASKED: tl.constexpr,
    OWN: tl.constexpr,
    LANES: tl.constexpr,
):
    value = load_tile(row_ptr, first_lane, place, vocab_size, MASKED, OWN, LANES)
    value = tl.where(value > HIGHEST, HIGHEST, value)
    top = tl.max(value, axis=1)
    index = tile_tokens(first_lane, place, OWN, LANES)
    token = tl.min(tl.where(value == top[:, None, :], index, _NO_TOKEN), axis=1)
    # a comparison with NaN fails
    return tl.where(top > best, top, best), tl.where(top > best, token, winner)


@triton.jit
def _best_token(
    # [vocab_size]
    row_ptr,
    first_lane,
    vocab_size,
    OWN: tl.constexpr,
    LANES: tl.constexpr,
):
    """The largest logit of OWN lanes, and its lowest token; LOWEST if none is possible."""
    best = tl.full([ROWS, OWN], LOWEST, tl.float32)
    winner = tl.full([ROWS, OWN], _NO_TOKEN, tl.int32)
    whole = whole_steps(vocab_size, LANES)
    for place in tl.range(0, whole, STEP, num_stages=STAGES):
        best, winner = _better(
            best, winner, row_ptr, first_lane, place, vocab_size, False, OWN, LANES
        )
    if whole * LANES < vocab_size:
        best, winner = _better(
            best, winner, row_ptr, first_lane, whole, vocab_size, True, OWN, LANES
        )
    return _lowest_of_best(tl.reshape(best, [ROWS * OWN]), tl.reshape(winner, [ROWS * OWN]))


@triton.jit
def _lowest_of_best(
    # [n]
    value,
    # [n]
    token,
):
    best = tl.max(value, axis=0)
    return best, tl.min(tl.where(value == best, token, _NO_TOKEN), axis=0)


@triton.jit
def _children(
    node,
    num_nodes,
    # [num_tree_nodes] each, the request's
    first_child_ptr,
    num_children_ptr,
):
    """A node's first child, and how many there are. A node that lost one to truncation has none."""
    first = tl.load(first_child_ptr + node)
    count = tl.load(num_children_ptr + node)
    return first, tl.where(first + count - 1 <= num_nodes, count, 0)


@triton.jit
def _child_tokens(
    # [num_rows]
    node_tokens_ptr,
    row,
    first,
    count,
):
    """[MAX_CHILDREN] int32, -1 past the last."""
    slots = tl.arange(0, MAX_CHILDREN)
    tokens = tl.load(node_tokens_ptr + row + first + slots, mask=slots < count, other=-1)
    return tokens.to(tl.int32)


@triton.jit
def _draft_scale(
    # [max_num_reqs]
    draft_temperature_ptr,
    req,
    sharpening,
):
    temperature = tl.load(draft_temperature_ptr + req)
    return LOG2_E * sharpening / tl.where(temperature == 0.0, 1.0, temperature)


@triton.jit(do_not_specialize=_HOST_NUMBERS)
def _statistics_kernel(
    # [num_reqs, num_tree_nodes, SPLITS, _SUMS], written for nodes that have children
    sums_ptr,
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
    # [max_num_reqs, num_tree_nodes] each, where a stride of 0 stands for a static tree
    first_child_ptr,
    num_children_ptr,
    tree_stride,
    # [num_tree_nodes]
    internal_index_ptr,
    num_tree_nodes,
    vocab_size,
    sharpening,
    LANES: tl.constexpr,
    SPLITS: tl.constexpr,
    # at least as many as a lane has tokens
    PLACES: tl.constexpr,
):
    """Grid: (SPLITS, nodes above the last level, num_reqs)."""
    OWN: tl.constexpr = LANES // SPLITS
    split, node, out = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    req = tl.load(req_idx_ptr + out).to(tl.int64)
    first_child_ptr += req * tree_stride
    num_children_ptr += req * tree_stride
    first, count = _children(node, tl.load(num_nodes_ptr + out), first_child_ptr, num_children_ptr)
    if count > 0:
        row = tl.load(row_start_ptr + out).to(tl.int64)
        target_ptr = target_logits_ptr + (row + node) * target_logits_stride
        temperature = tl.load(target_temperature_ptr + req)
        sums_ptr += ((out * num_tree_nodes + node) * SPLITS + split) * _SUMS
        if temperature == 0.0:
            best, token = _best_token(target_ptr, split * OWN, vocab_size, OWN, LANES)
            tl.store(sums_ptr, best)
            tl.store(sums_ptr + 1, token.to(tl.float32))
        else:
            children = _child_tokens(node_tokens_ptr, row, first, count)
            scale = LOG2_E / temperature
            peak, total = _sums_off(
                target_ptr, split * OWN, children, scale, vocab_size, OWN, LANES, PLACES
            )
            tl.store(sums_ptr, peak)
            tl.store(sums_ptr + 1, total)
            internal = tl.load(internal_index_ptr + node).to(tl.int64)
            # a draft without samples is not read
            if tl.load(sampled_ptr + req * sampled_stride + internal) != 0:
                draft_ptr = (
                    draft_logits_ptr
                    + req * draft_logits_req_stride
                    + internal * draft_logits_node_stride
                )
                scale = _draft_scale(draft_temperature_ptr, req, sharpening)
                peak, total = _sums_off(
                    draft_ptr, split * OWN, children, scale, vocab_size, OWN, LANES, PLACES
                )
                tl.store(sums_ptr + 2, peak)
                tl.store(sums_ptr + 3, total)


@triton.jit(do_not_specialize=_HOST_NUMBERS)
def _residual_kernel(
    # [num_reqs, num_tree_nodes, MAX_CHILDREN, SPLITS], written for the nodes' next samples
    left_ptr,
    # [num_reqs, num_tree_nodes]
    visit_ptr,
    # [num_reqs, num_tree_nodes, _RECORD]
    record_ptr,
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
    # [max_num_reqs, num_tree_nodes] each, where a stride of 0 stands for a static tree
    first_child_ptr,
    num_children_ptr,
    tree_stride,
    # [num_tree_nodes]
    internal_index_ptr,
    # the first node of the level
    first_node,
    # how many samples have failed before
    failed,
    num_tree_nodes,
    vocab_size,
    sharpening,
    LEAF_TO_ROOT: tl.constexpr,
    LANES: tl.constexpr,
    SPLITS: tl.constexpr,
    # at least as many as a lane has tokens
    PLACES: tl.constexpr,
):
    """Grid: (SPLITS, nodes of the level, num_reqs)."""
    OWN: tl.constexpr = LANES // SPLITS
    split, out = tl.program_id(0), tl.program_id(2).to(tl.int64)
    node = first_node + tl.program_id(1)
    req = tl.load(req_idx_ptr + out).to(tl.int64)
    first_child_ptr += req * tree_stride
    num_children_ptr += req * tree_stride
    first, count = _children(node, tl.load(num_nodes_ptr + out), first_child_ptr, num_children_ptr)
    if count > 0:
        internal = tl.load(internal_index_ptr + node).to(tl.int64)
        bits = tl.load(sampled_ptr + req * sampled_stride + internal)
        slots = tl.arange(0, MAX_CHILDREN)
        num_samples = tl.sum(tl.where(slots < count, (bits >> slots) & 1, 0), axis=0)
        at_node = out * num_tree_nodes + node
        acceptance = tl.full([], 1.0, tl.float32)
        if LEAF_TO_ROOT:
            acceptance = tl.load(visit_ptr + at_node, mask=node > 0, other=1.0)
        temperature = tl.load(target_temperature_ptr + req)
        if (num_samples > failed) & (acceptance > 0.0) & (temperature != 0.0):
            row = tl.load(row_start_ptr + out).to(tl.int64)
            record_ptr += at_node * _RECORD
            scale = _draft_scale(draft_temperature_ptr, req, sharpening)
            left = _lane_residuals(
                target_logits_ptr + (row + node) * target_logits_stride,
                draft_logits_ptr
                + req * draft_logits_req_stride
                + internal * draft_logits_node_stride,
                split * OWN,
                _child_tokens(node_tokens_ptr, row, first, count),
                (
                    tl.load(record_ptr),
                    acceptance * tl.load(record_ptr + 1),
                    LOG2_E / temperature,
                ),
                (tl.load(record_ptr + 2), tl.load(record_ptr + 3), scale),
                vocab_size,
                OWN,
                LANES,
                PLACES,
            )
            left_ptr += (at_node * MAX_CHILDREN + failed) * SPLITS + split
            tl.store(left_ptr, tl.sum(left, axis=0))


@triton.jit(do_not_specialize=_HOST_NUMBERS)
def _outcome_kernel(
    # [num_reqs, num_tree_nodes] each, written for the nodes' children and for the nodes
    visit_ptr,
    leave_ptr,
    # [num_reqs, num_tree_nodes, _RECORD], written for the nodes
    record_ptr,
    # [num_reqs, num_tree_nodes, SPLITS, _SUMS]
    sums_ptr,
    # [num_reqs, num_tree_nodes, MAX_CHILDREN, SPLITS]
    left_ptr,
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
    # [max_num_reqs, num_tree_nodes] each, where a stride of 0 stands for a static tree
    first_child_ptr,
    num_children_ptr,
    tree_stride,
    # [num_tree_nodes]
    internal_index_ptr,
    # the first node of the level
    first_node,
    # how many samples have failed
    failed,
    num_tree_nodes,
    vocab_size,
    sharpening,
    LEAF_TO_ROOT: tl.constexpr,
    REPLACES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid: (nodes of the level, num_reqs). Before any sample has failed it finds the first one's
    factor only, which does not depend on what the node is visited with."""
    node, out = first_node + tl.program_id(0), tl.program_id(1).to(tl.int64)
    at_node = out * num_tree_nodes + node
    record_ptr += at_node * _RECORD
    acceptance = tl.full([], 1.0, tl.float32)
    if LEAF_TO_ROOT:
        acceptance = tl.load(visit_ptr + at_node, mask=(node > 0) & (failed > 0), other=1.0)
    req = tl.load(req_idx_ptr + out).to(tl.int64)
    first_child_ptr += req * tree_stride
    num_children_ptr += req * tree_stride
    first, count = _children(node, tl.load(num_nodes_ptr + out), first_child_ptr, num_children_ptr)
    slots = tl.arange(0, MAX_CHILDREN)
    visit = tl.zeros([MAX_CHILDREN], tl.float32)
    leave = acceptance
    if (count > 0) & (acceptance > 0.0):
        row = tl.load(row_start_ptr + out).to(tl.int64)
        children = _child_tokens(node_tokens_ptr, row, first, count)
        temperature = tl.load(target_temperature_ptr + req)
        splits = tl.arange(0, SPLITS)
        parts_ptr = sums_ptr + (at_node * SPLITS + splits) * _SUMS
        if temperature == 0.0:
            token = tl.load(parts_ptr + 1).to(tl.int32)
            best, token = _lowest_of_best(tl.load(parts_ptr), token)
            token = tl.where(best > LOWEST, token, 0)
            visit = (children == token).to(tl.float32)
            tl.store(record_ptr, token.to(tl.float32))
        else:
            internal = tl.load(internal_index_ptr + node).to(tl.int64)
            bits = tl.load(sampled_ptr + req * sampled_stride + internal)
            visit, leave, record = _outcome(
                target_logits_ptr + (row + node) * target_logits_stride,
                draft_logits_ptr
                + req * draft_logits_req_stride
                + internal * draft_logits_node_stride,
                children,
                ((bits >> slots) & 1 == 1) & (slots < count),
                (tl.load(parts_ptr), tl.load(parts_ptr + 1)),
                (
                    tl.load(parts_ptr + 2, mask=bits != 0, other=LOWEST),
                    tl.load(parts_ptr + 3, mask=bits != 0, other=0.0),
                ),
                left_ptr + at_node * (MAX_CHILDREN * SPLITS) + splits,
                failed,
                LOG2_E / temperature,
                _draft_scale(draft_temperature_ptr, req, sharpening),
                acceptance,
                REPLACES,
                SPLITS,
            )
            tl.store(record_ptr, record[0])
            tl.store(record_ptr + 1, record[1])
            tl.store(record_ptr + 2, record[2])
            tl.store(record_ptr + 3, record[3])
    if failed > 0:
        tl.store(leave_ptr + at_node, leave if LEAF_TO_ROOT else acceptance)
        # also where truncation left none of them, so that every node's is written
        present = slots < tl.load(num_children_ptr + node)
        tl.store(visit_ptr + out * num_tree_nodes + first + slots, visit, mask=present)


@triton.jit
def _outcome(
    # [vocab_size] each
    target_ptr,
    draft_ptr,
    # [MAX_CHILDREN], -1 past the last
    children,
    # [MAX_CHILDREN] bool
    sampled,
    # peaks and sums of the parts of the rows off the children, [SPLITS] each
    target_sums,
    draft_sums,
    # [SPLITS] pointers, for the first sample
    left_ptr,
    failed,
    target_scale,
    scale,
    acceptance,
    REPLACES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """`node.node_outcome`, as far as sums are there: what every child is visited with,
    [MAX_CHILDREN], what the node is accepted with once they have failed, and its record."""
    slots = tl.arange(0, MAX_CHILDREN)
    present = children >= 0
    hub = present & (sampled == 0)
    token = tl.where(present, children, 0)
    # Of tokens that are held twice the first counts. [MAX_CHILDREN, MAX_CHILDREN]
    same = (children[:, None] == children[None, :]) & (slots[None, :] < slots[:, None])
    again = tl.max((same & sampled[None, :]).to(tl.int32), axis=1) > 0
    first_of_token = present & (tl.max(same.to(tl.int32), axis=1) == 0)

    logit = tl.where(present, tl.load(target_ptr + token).to(tl.float32), LOWEST)
    logit = _bounded(logit, limit(target_scale))
    off_peak = tl.max(target_sums[0], axis=0)
    target_peak = tl.maximum(off_peak, tl.max(logit, axis=0))
    # A target that masks every token is token 0, which no pass over its row finds.
    possible = target_peak > LOWEST
    off_children = total_weight(target_sums[0], target_sums[1], target_peak, target_scale)
    weight = power(logit, target_peak, target_scale)
    total = off_children + tl.sum(tl.where(first_of_token, weight, 0.0), axis=0)
    inverse = tl.where(possible, 1.0 / tl.where(possible, total, 1.0), 0.0)
    # Children by slot: their share of the target, their draft logits, scaled
    share = tl.where(possible, inverse * weight, (token == 0).to(tl.float32))
    owed = tl.where(present, acceptance * share, 0.0)
    owed_first = tl.where(possible | (tl.min(tl.where(present, children, 1)) == 0), 0.0, acceptance)
    any_sample = tl.max(sampled.to(tl.int32), axis=0) > 0
    logit = tl.load(draft_ptr + token, mask=any_sample, other=LOWEST).to(tl.float32)
    logit = _bounded(logit, limit(scale)) * scale
    first_logit = tl.load(draft_ptr, mask=any_sample, other=LOWEST).to(tl.float32)

    # The draft off all children. Where nothing is left, the peak is that of no token.
    draft_peak = tl.max(draft_sums[0], axis=0)
    top = draft_peak * scale
    left_to_draw = draft_peak > LOWEST
    undrawn = total_weight(draft_sums[0], draft_sums[1], draft_peak, scale)
    undrawn = tl.where(left_to_draw, top + tl.log2(tl.where(left_to_draw, undrawn, 1.0)), LOWEST)

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
    visit = tl.zeros([MAX_CHILDREN], tl.float32)
    left = tl.full([], 1.0, tl.float32)
    kappa = tl.full([], 0.0, tl.float32)
    factor = tl.full([], 0.0, tl.float32)
    # without samples no pass is needed
    mass = acceptance * inverse * off_children + owed_first
    log_sum = at(log_sums, slots, 0)
    number = tl.full([], 0, tl.int32)
    for slot in tl.static_range(MAX_CHILDREN):
        if (at(sampled.to(tl.int32), slots, slot) > 0) & (number <= failed):
            z, own_sum = at(logit, slots, slot), at(log_sums, slots, slot)
            chance = at(owed, slots, slot) - kappa * tl.exp2(z - log_sum)
            chance = tl.where(at(again.to(tl.int32), slots, slot) > 0, 0.0, tl.maximum(chance, 0.0))
            visit = tl.where(slots == slot, _ratio(chance, left * tl.exp2(z - own_sum)), visit)
            kappa = left + kappa * tl.exp2(own_sum - log_sum)
            log_sum = own_sum
            factor = tl.where(left_to_draw, kappa * tl.exp2(top - log_sum), 0.0)
            if number < failed:
                # samples that have not been visited
                later = sampled & (slots > slot) & (again == 0)
                waiting = tl.maximum(owed - kappa * tl.exp2(logit - log_sum), 0.0)
                mass = tl.sum(tl.load(left_ptr + number * SPLITS), axis=0)
                mass += tl.sum(tl.where(later, waiting, 0.0), axis=0)
                q = (draft_peak, factor, scale)
                mass += _residual(0.0, first_logit, (0.0, owed_first, 1.0), q)
                left = lacking + hub_mass + mass
            number += 1
    # Summed from the end: nothing cancels.
    owed_hubs = tl.where(hub, owed, 0.0)
    unvisited = tl.cumsum(owed_hubs, axis=0, reverse=True) + (lacking + mass)
    visit = tl.where(hub, _ratio(owed_hubs, unvisited), visit)
    # Nothing left is reached by rounding only, and then with acceptance 1: the last token comes
    # from the target.
    stuck = mass <= 0.0
    leave = tl.where(acceptance >= 1.0, 1.0, 0.0)
    leave = tl.where(stuck, leave, mass / tl.where(stuck, 1.0, lacking + mass))
    factor = tl.where(stuck & (number <= failed), -1.0, factor)
    return visit, leave, (target_peak, inverse, draft_peak, factor)


@triton.jit
def _bounded(value, highest):
    """From LOWEST, also for NaN, to the highest."""
    return tl.where(value > LOWEST, tl.minimum(value, highest), LOWEST)


@triton.jit
def _next_slot(slot, bits, count):
    """The child that is visited after another: samples by slot, then hubs by slot. -1 before the
    first and after the last."""
    slots = tl.arange(0, MAX_CHILDREN)
    turns = tl.where((bits >> slots) & 1 == 1, slots, slots + MAX_CHILDREN)
    turn = tl.where(slot < 0, -1, at(turns, slots, slot))
    following = tl.min(tl.where((slots < count) & (turns > turn), turns, _NO_TURN), axis=0)
    return tl.where(following == _NO_TURN, -1, following % MAX_CHILDREN)


@triton.jit(do_not_specialize=_HOST_NUMBERS)
def _walk_kernel(
    # [num_reqs, max_depth + 1], all but the last token is written
    tokens_ptr,
    # [num_reqs]
    num_emitted_ptr,
    # [num_reqs, max_depth + 1]
    path_ptr,
    # [num_reqs], written: the path's last node
    last_node_ptr,
    # [num_reqs, num_tree_nodes] each
    visit_ptr,
    leave_ptr,
    # [num_reqs]
    row_start_ptr,
    # [num_reqs]
    num_nodes_ptr,
    # [num_rows]
    node_tokens_ptr,
    # [max_num_reqs, num_internal]
    sampled_ptr,
    sampled_stride,
    # [num_reqs]
    req_idx_ptr,
    # [max_num_reqs]
    seeds_ptr,
    # [num_reqs]
    root_positions_ptr,
    # [max_num_reqs, num_tree_nodes] each, where a stride of 0 stands for a static tree
    first_child_ptr,
    num_children_ptr,
    parents_ptr,
    tree_stride,
    # [num_tree_nodes]
    internal_index_ptr,
    max_depth,
    num_tree_nodes,
    LEAF_TO_ROOT: tl.constexpr,
):
    """Grid: (num_reqs,)."""
    out = tl.program_id(0).to(tl.int64)
    visit_ptr += out * num_tree_nodes
    leave_ptr += out * num_tree_nodes
    req = tl.load(req_idx_ptr + out).to(tl.int64)
    row = tl.load(row_start_ptr + out).to(tl.int64)
    num_nodes = tl.load(num_nodes_ptr + out)
    seed = tl.load(seeds_ptr + req)
    position = tl.load(root_positions_ptr + out)
    sampled_ptr += req * sampled_stride
    first_child_ptr += req * tree_stride
    num_children_ptr += req * tree_stride
    parents_ptr += req * tree_stride

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
    tl.store(last_node_ptr + out, node)

    depth = tl.full([], 0, tl.int32)
    above = node
    while above > 0:
        above = tl.load(parents_ptr + above)
        depth += 1
    tl.store(num_emitted_ptr + out, depth + 1)
    depths = tl.arange(0, _LONGEST_PATH)
    path = tl.where(depths == 0, 0, -1)
    while depth > 0:
        path = tl.where(depths == depth, node, path)
        node = tl.load(parents_ptr + node)
        depth -= 1
    tokens = tl.load(node_tokens_ptr + row + path, mask=path > 0, other=-1)
    to = out * (max_depth + 1) + depths
    tl.store(path_ptr + to, path, mask=depths <= max_depth)
    # a node's token is emitted before its own row's
    tl.store(tokens_ptr + to - 1, tokens.to(tl.int64), mask=(depths > 0) & (depths <= max_depth))
    tl.store(tokens_ptr + out * (max_depth + 1) + max_depth, -1)


@triton.jit
def _last_row(
    # [num_reqs, num_tree_nodes]
    visit_ptr,
    # [num_reqs, num_tree_nodes, _RECORD]
    record_ptr,
    # [num_reqs]
    row_start_ptr,
    # [num_reqs]
    num_nodes_ptr,
    # [num_rows]
    node_tokens_ptr,
    # [num_tree_nodes] each, the request's
    first_child_ptr,
    num_children_ptr,
    node,
    out,
    num_tree_nodes,
    LEAF_TO_ROOT: tl.constexpr,
):
    """Of the node where a path ends: its children, which its residual leaves out; what its weights
    are multiplied by; its target's and its draft's peak; its draft's factor; and whether these are
    known. A leaf, and a node that rounding left nothing of, emits from the target."""
    first, count = _children(node, tl.load(num_nodes_ptr + out), first_child_ptr, num_children_ptr)
    row = tl.load(row_start_ptr + out).to(tl.int64)
    record_ptr += (out * num_tree_nodes + node) * _RECORD
    inner = count > 0
    spent = tl.load(record_ptr + 3, mask=inner, other=-1.0)
    known = inner & (spent >= 0.0)
    children = _child_tokens(node_tokens_ptr, row, first, tl.where(known, count, 0))
    acceptance = tl.full([], 1.0, tl.float32)
    if LEAF_TO_ROOT:
        acceptance = tl.load(visit_ptr + out * num_tree_nodes + node, mask=node > 0, other=1.0)
    factor = acceptance * tl.load(record_ptr + 1, mask=known, other=1.0)
    peak = tl.load(record_ptr, mask=inner, other=0.0)
    draft_peak = tl.load(record_ptr + 2, mask=known, other=0.0)
    return inner, known, children, peak, factor, draft_peak, tl.where(known, spent, 0.0)


@triton.jit(do_not_specialize=_HOST_NUMBERS)
def _race_kernel(
    # [num_reqs, SPLITS, _ENTRY], written
    entries_ptr,
    # [num_reqs]
    last_node_ptr,
    # [num_reqs, num_tree_nodes]
    visit_ptr,
    # [num_reqs, num_tree_nodes, _RECORD]
    record_ptr,
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
    # [num_reqs]
    req_idx_ptr,
    # [max_num_reqs]
    draft_temperature_ptr,
    # [max_num_reqs]
    seeds_ptr,
    # [num_reqs]
    root_positions_ptr,
    # [max_num_reqs, num_tree_nodes] each, where a stride of 0 stands for a static tree
    first_child_ptr,
    num_children_ptr,
    tree_stride,
    # [num_tree_nodes]
    internal_index_ptr,
    num_tree_nodes,
    vocab_size,
    sharpening,
    LEAF_TO_ROOT: tl.constexpr,
    LANES: tl.constexpr,
    SPLITS: tl.constexpr,
    # at least as many as a lane has tokens
    PLACES: tl.constexpr,
):
    """Grid: (SPLITS, num_reqs)."""
    OWN: tl.constexpr = LANES // SPLITS
    split, out = tl.program_id(0), tl.program_id(1).to(tl.int64)
    node = tl.load(last_node_ptr + out)
    req = tl.load(req_idx_ptr + out).to(tl.int64)
    row = tl.load(row_start_ptr + out).to(tl.int64)
    target_ptr = target_logits_ptr + (row + node) * target_logits_stride
    temperature = tl.load(target_temperature_ptr + req)
    entries_ptr += (out * SPLITS + split) * _ENTRY
    first_child_ptr += req * tree_stride
    num_children_ptr += req * tree_stride
    inner, known, children, peak, factor, draft_peak, spent = _last_row(
        visit_ptr,
        record_ptr,
        row_start_ptr,
        num_nodes_ptr,
        node_tokens_ptr,
        first_child_ptr,
        num_children_ptr,
        node,
        out,
        num_tree_nodes,
        LEAF_TO_ROOT,
    )
    lane = split * OWN + tl.arange(0, OWN)
    if temperature == 0.0:
        if not inner:
            best, token = _best_token(target_ptr, split * OWN, vocab_size, OWN, LANES)
            tl.store(entries_ptr, best)
            tl.store(entries_ptr + 1, token.to(tl.float32))
    else:
        weights = tl.zeros([OWN], tl.float32)
        if known:
            internal = tl.load(internal_index_ptr + node).to(tl.int64)
            scale = _draft_scale(draft_temperature_ptr, req, sharpening)
            weights = _lane_residuals(
                target_ptr,
                draft_logits_ptr
                + req * draft_logits_req_stride
                + internal * draft_logits_node_stride,
                split * OWN,
                children,
                (peak, factor, LOG2_E / temperature),
                (draft_peak, spent, scale),
                vocab_size,
                OWN,
                LANES,
                PLACES,
            )
        else:
            scale = LOG2_E / temperature
            peaks, sums = lane_sums(
                target_ptr, split * OWN, scale, limit(scale), vocab_size, OWN, LANES
            )
            peak = tl.max(peaks, axis=0)
            weights = sums * rescaled(peaks, peak, scale)
        key = row_key(tl.load(seeds_ptr + req), tl.load(root_positions_ptr + out), node, RESIDUAL)
        winner, score = draw_lane(weights, lane, key, 0)
        tl.store(entries_ptr, score)
        tl.store(entries_ptr + 1, winner.to(tl.float32))
        tl.store(entries_ptr + 2, peak)


@triton.jit(do_not_specialize=_HOST_NUMBERS)
def _last_token_kernel(
    # [num_reqs, max_depth + 1], the last token is written
    tokens_ptr,
    # [num_reqs]
    num_emitted_ptr,
    # [num_reqs, SPLITS, _ENTRY]
    entries_ptr,
    # [num_reqs]
    last_node_ptr,
    # [num_reqs, num_tree_nodes]
    visit_ptr,
    # [num_reqs, num_tree_nodes, _RECORD]
    record_ptr,
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
    # [num_reqs]
    req_idx_ptr,
    # [max_num_reqs]
    draft_temperature_ptr,
    # [max_num_reqs]
    seeds_ptr,
    # [num_reqs]
    root_positions_ptr,
    # [max_num_reqs, num_tree_nodes] each, where a stride of 0 stands for a static tree
    first_child_ptr,
    num_children_ptr,
    tree_stride,
    # [num_tree_nodes]
    internal_index_ptr,
    max_depth,
    num_tree_nodes,
    vocab_size,
    sharpening,
    LEAF_TO_ROOT: tl.constexpr,
    LANES: tl.constexpr,
    SPLITS: tl.constexpr,
    # at least as many as a lane has tokens
    PLACES: tl.constexpr,
):
    """Grid: (num_reqs,)."""
    out = tl.program_id(0).to(tl.int64)
    node = tl.load(last_node_ptr + out)
    req = tl.load(req_idx_ptr + out).to(tl.int64)
    row = tl.load(row_start_ptr + out).to(tl.int64)
    temperature = tl.load(target_temperature_ptr + req)
    first_child_ptr += req * tree_stride
    num_children_ptr += req * tree_stride
    inner, known, children, peak, factor, draft_peak, spent = _last_row(
        visit_ptr,
        record_ptr,
        row_start_ptr,
        num_nodes_ptr,
        node_tokens_ptr,
        first_child_ptr,
        num_children_ptr,
        node,
        out,
        num_tree_nodes,
        LEAF_TO_ROOT,
    )
    splits = tl.arange(0, SPLITS)
    entries_ptr += (out * SPLITS + splits) * _ENTRY
    # peaks are the best tokens of greedy requests
    token = peak.to(tl.int32)
    if temperature == 0.0:
        if not inner:
            best, token = _lowest_of_best(
                tl.load(entries_ptr), tl.load(entries_ptr + 1).to(tl.int32)
            )
            token = tl.where(best > LOWEST, token, 0)
    else:
        peaks = tl.load(entries_ptr + 2)
        peak = tl.max(peaks, axis=0)
        score = tl.load(entries_ptr) * rescaled(peaks, peak, LOG2_E / temperature)
        winner = first_best(score, splits)
        lane = at(tl.load(entries_ptr + 1), splits, winner).to(tl.int32)
        internal = tl.load(internal_index_ptr + node).to(tl.int64)
        draft_ptr = (
            draft_logits_ptr + req * draft_logits_req_stride + internal * draft_logits_node_stride
        )
        target_ptr = target_logits_ptr + (row + node) * target_logits_stride
        scale = _draft_scale(draft_temperature_ptr, req, sharpening)
        weights = _place_residuals(
            target_ptr,
            tl.where(known, draft_ptr, target_ptr),
            lane,
            children,
            (peak, factor, LOG2_E / temperature),
            (draft_peak, spent, scale),
            vocab_size,
            PLACES,
            LANES,
        )
        key = row_key(tl.load(seeds_ptr + req), tl.load(root_positions_ptr + out), node, RESIDUAL)
        token = lane + LANES * draw_place(weights, key, 0, PLACES, LANES)
    depth = tl.load(num_emitted_ptr + out) - 1
    tl.store(tokens_ptr + out * (max_depth + 1) + depth, token.to(tl.int64))


def _num_samples(rule: Rule, most: int) -> int:
    """The most samples among so many children."""
    never, always, _ = rule.hubs.value
    return most - min(always, most - never)


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
    num_reqs, num_tree_nodes = len(target.row_start), tree.num_nodes
    max_depth = len(level_sizes) - 1
    device, vocab_size = target.logits.device, target.logits.shape[1]
    splits = lanes_device.SPLITS

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(num_reqs, *shape, dtype=dtype, device=device)

    paths = VerifiedPaths(
        empty(max_depth + 1, dtype=torch.int64),
        empty(dtype=torch.int32),
        empty(max_depth + 1, dtype=torch.int32),
    )
    if num_reqs == 0:
        return paths
    visit, leave = empty(num_tree_nodes), empty(num_tree_nodes)
    sums = empty(num_tree_nodes, splits, _SUMS.value)
    left = empty(num_tree_nodes, MAX_CHILDREN.value, splits)
    record = empty(num_tree_nodes, _RECORD.value)
    entries, last_node = empty(splits, _ENTRY.value), empty(dtype=torch.int32)
    logits = target.logits, target.logits.stride(0)
    of_target = target.row_start, target.num_nodes, target.node_tokens
    drafted = drafts.logits, drafts.logits.stride(0), drafts.logits.stride(1)
    sampled = drafts.sampled, drafts.sampled.stride(0)
    seeds = requests.seeds, requests.root_positions
    shape = tree.first_child, tree.num_children
    strided = tree.request_stride, tree.internal_index
    sizes = num_tree_nodes, vocab_size, float(sharpening)
    rows = (
        *logits,
        target.temperature,
        *of_target,
        *drafted,
        *sampled,
        requests.req_idx,
        requests.temperature,
        *shape,
        *strided,
    )
    leaf_to_root = traits.is_leaf_to_root
    lanes = {
        "LANES": rng.LANES,
        "SPLITS": splits,
        "PLACES": triton.next_power_of_2(triton.cdiv(vocab_size, rng.LANES)),
    }

    def outcomes(first_node: int, count: int, failed: int) -> None:
        _outcome_kernel[(count, num_reqs)](
            visit,
            leave,
            record,
            sums,
            left,
            *rows,
            first_node,
            failed,
            *sizes,
            LEAF_TO_ROOT=leaf_to_root,
            REPLACES=traits.replaces,
            SPLITS=splits,
            num_warps=1,
        )

    # The deepest nodes are leaves.
    num_inner = sum(level_sizes[:-1])
    _statistics_kernel[(splits, num_inner, num_reqs)](
        sums, *rows, *sizes, **lanes, num_warps=PASS_WARPS
    )
    outcomes(0, num_inner, 0)
    # From root to leaf no node waits for another.
    levels = [(level_sizes[i], level_sizes[i + 1]) for i in range(max_depth)]
    if not leaf_to_root:
        levels = [(num_inner, max(level_sizes))]
    first_node = 0
    for count, most in levels:
        most = min(most, traits.max_children)
        for failed in range(max(1, _num_samples(traits, most))):
            _residual_kernel[(splits, count, num_reqs)](
                left,
                visit,
                record,
                *rows,
                first_node,
                failed,
                *sizes,
                LEAF_TO_ROOT=leaf_to_root,
                **lanes,
                num_warps=PASS_WARPS,
            )
            outcomes(first_node, count, failed + 1)
        first_node += count
    _walk_kernel[(num_reqs,)](
        paths.tokens,
        paths.num_emitted,
        paths.path,
        last_node,
        visit,
        leave,
        *of_target,
        *sampled,
        requests.req_idx,
        *seeds,
        *shape,
        tree.parents,
        *strided,
        max_depth,
        num_tree_nodes,
        LEAF_TO_ROOT=leaf_to_root,
        num_warps=1,
    )
    last_rows = (
        last_node,
        visit,
        record,
        *logits,
        target.temperature,
        *of_target,
        *drafted,
        requests.req_idx,
        requests.temperature,
        *seeds,
        *shape,
        *strided,
    )
    _race_kernel[(splits, num_reqs)](
        entries,
        *last_rows,
        *sizes,
        LEAF_TO_ROOT=leaf_to_root,
        **lanes,
        num_warps=PASS_WARPS,
    )
    _last_token_kernel[(num_reqs,)](
        paths.tokens,
        paths.num_emitted,
        entries,
        *last_rows,
        max_depth,
        *sizes,
        LEAF_TO_ROOT=leaf_to_root,
        **lanes,
        num_warps=1,
    )
    return paths
