# SPDX-License-Identifier: Apache-2.0
"""Child sampling in Triton: one program per row, one pass over its logits."""

import torch
import triton
import triton.language as tl

from .. import rng
from ..arguments import Children, Requests
from ..constants import LOWEST
from ..rng_device import CHILD, LABEL, element_hash, exponential, fast_log, row_key, uniform
from ..rules import BUILTIN_RULES, Rule
from ..sums_device import join

# Stands for the logit -inf, so that masked tokens still rank above empty list entries.
_LOWEST = tl.constexpr(LOWEST)
_EMPTY = tl.constexpr(-3.4e38)
# What a lane's list begins with, in its order.
_FIRST = tl.constexpr(-3.1e38)
_SECOND = tl.constexpr(-3.2e38)
_THIRD = tl.constexpr(-3.3e38)
_NO_INDEX = tl.constexpr(2**31 - 1)

NUM_WARPS = 16


@triton.jit
def _push(ahead, value, index, entry_value, entry_index):
    """What is ahead of an entry takes its place and hands it on, else it is handed on itself."""
    return (
        tl.where(ahead, value, entry_value),
        tl.where(ahead, index, entry_index),
        tl.where(ahead, entry_value, value),
        tl.where(ahead, entry_index, index),
    )


@triton.jit
def _insert(value, index, entry_value, entry_index):
    """Keep the better of a newcomer and a list entry; hand the other one on."""
    ahead = (value > entry_value) | ((value == entry_value) & (index < entry_index))
    return _push(ahead, value, index, entry_value, entry_index)


@triton.jit
def _race_score(value, index, key, scale, greedy):
    noise = fast_log(exponential(element_hash(key, index)))
    score = tl.maximum(value * scale - tl.where(greedy, 0.0, noise), _LOWEST)
    return tl.where(value == _EMPTY, _EMPTY, score)


@triton.jit
def _best(value, index):
    """The largest value over lanes and its index, the lowest of a tie."""
    best = tl.max(value, axis=0)
    return best, tl.min(tl.where(value == best, index, _NO_INDEX), axis=0)


@triton.jit
def _draw_independently(
    # [max_children]
    tokens_ptr,
    # [vocab_size]
    logits_ptr,
    key,
    scale,
    num_children,
    vocab_size,
    MAX_CHILDREN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """One draw per slot from all tokens; slot j counts on where slot j - 1 ended."""
    lane = tl.arange(0, BLOCK_SIZE)[None, :]
    slot = tl.arange(0, 4 if MAX_CHILDREN > 2 else MAX_CHILDREN)[:, None]
    race = tl.full([slot.shape[0], BLOCK_SIZE], _EMPTY, tl.float32)
    winner = tl.zeros([slot.shape[0], BLOCK_SIZE], tl.int32)
    peak = tl.full([1, BLOCK_SIZE], _EMPTY, tl.float32)
    for start in range(0, vocab_size, BLOCK_SIZE):
        index = start + lane
        valid = index < vocab_size
        value = tl.load(logits_ptr + index, mask=valid, other=0.0)
        value = tl.where(valid, tl.maximum(value.to(tl.float32), _LOWEST), _EMPTY)
        peak = tl.maximum(peak, value)
        noise = fast_log(exponential(element_hash(key, slot * vocab_size + index)))
        score = tl.where(value == _EMPTY, _EMPTY, tl.maximum(value * scale - noise, _LOWEST))
        ahead = score > race
        race = tl.where(ahead, score, race)
        winner = tl.where(ahead, index, winner)
    best = tl.max(race, axis=1, keep_dims=True)
    token = tl.min(tl.where(race == best, winner, _NO_INDEX), axis=1, keep_dims=True)
    # A row without any possible token is drafted as a greedy one.
    token = tl.where(tl.max(peak, axis=1, keep_dims=True) == _LOWEST, slot, token)
    token = tl.where(slot < num_children, token, -1)
    tl.store(tokens_ptr + slot, token.to(tl.int64), mask=slot < MAX_CHILDREN)


@triton.jit
def _draw_off_hubs(
    # [vocab_size]
    logits_ptr,
    # three tokens, -1 where there is no hub
    hubs,
    # [BLOCK_SIZE] each, of every lane off the hubs: the best logit, and the sum of exponentials
    # relative to it
    peaks,
    masses,
    best_token,
    random,
    scale,
    key,
    vocab_size,
    BLOCK_SIZE: tl.constexpr,
    LANE_SIZE: tl.constexpr,
):
    """A lane by its mass, then one of its tokens, as `rng.draw`; the best token if not random."""
    token = best_token
    if random:
        lane = tl.arange(0, BLOCK_SIZE)
        occupied = peaks >= _LOWEST
        lane_logits = peaks * scale + fast_log(masses)
        lane_scores = _race_score(lane_logits, lane, key, 1.0, False)
        own_lane = _best(tl.where(occupied, lane_scores, _EMPTY), lane)[1]
        place = tl.arange(0, LANE_SIZE)
        index = own_lane + place * BLOCK_SIZE
        valid = index < vocab_size
        logits = tl.load(logits_ptr + index, mask=valid, other=0.0).to(tl.float32)
        valid &= (index != hubs[0]) & (index != hubs[1]) & (index != hubs[2])
        logits = tl.where(valid, tl.maximum(logits, _LOWEST), _EMPTY)
        scores = _race_score(logits, BLOCK_SIZE + place, key, scale, False)
        token = _best(scores, index)[1]
    return token


@triton.jit
def _sample_children_kernel(
    # [num_rows, max_children]
    tokens_ptr,
    # [num_rows]
    sample_slot_ptr,
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
    # whether slot 0 is distributed as the draft
    ORDERED: tl.constexpr,
    # whether all children are ranked in the race, not by logit; and drawn independently
    RACED: tl.constexpr,
    REPLACED: tl.constexpr,
    MAX_CHILDREN: tl.constexpr,
    SHARPENED: tl.constexpr,
    # the lanes of `rng.draw`, and at least as many as a lane has tokens
    BLOCK_SIZE: tl.constexpr,
    LANE_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_tokens_ptr = tokens_ptr + row * MAX_CHILDREN
    req = tl.load(req_idx_ptr + row).to(tl.int64)
    if req < 0:
        for slot in tl.static_range(MAX_CHILDREN):
            tl.store(row_tokens_ptr + slot, -1)
        tl.store(sample_slot_ptr + row, -1)
        return
    num_children = tl.load(num_children_ptr + row)
    temperature = tl.load(temperature_ptr + req)
    greedy = temperature == 0.0
    scale = 1.0 / tl.where(greedy, 1.0, temperature)
    seed = tl.load(seeds_ptr + req)
    position = tl.load(root_positions_ptr + row)
    node = tl.load(node_ids_ptr + row)
    race_scale = scale * sharpening
    key = row_key(seed, position, node, CHILD)
    if REPLACED and not greedy:
        _draw_independently(
            row_tokens_ptr,
            logits_ptr + row * logits_stride,
            key,
            scale,
            num_children,
            vocab_size,
            MAX_CHILDREN,
            BLOCK_SIZE,
        )
        tl.store(sample_slot_ptr + row, 0)
        return

    # Each lane keeps its own MAX_CHILDREN - 1 best tokens. What falls off its list is no hub: it
    # joins the race of rules that rank their children there, else the lane's best token and mass
    # off the hubs. Tokens come by rising index, and lists are sorted: who is ahead of an entry is
    # ahead of all that follow, and a tie is behind. A lane's peak below _LOWEST has no mass.
    lane = tl.arange(0, BLOCK_SIZE)
    hub0 = tl.full([BLOCK_SIZE], _FIRST, tl.float32)
    hub1 = tl.full([BLOCK_SIZE], _SECOND, tl.float32)
    hub2 = tl.full([BLOCK_SIZE], _THIRD, tl.float32)
    race = tl.full([BLOCK_SIZE], _EMPTY, tl.float32)
    index0 = tl.full([BLOCK_SIZE], _NO_INDEX, tl.int32)
    index1 = index0
    index2 = index0
    winner = index0
    mass = tl.zeros([BLOCK_SIZE], tl.float32)
    sharp_mass = mass
    for start in range(0, vocab_size, BLOCK_SIZE):
        index = start + lane
        valid = index < vocab_size
        value = tl.load(logits_ptr + row * logits_stride + index, mask=valid, other=0.0)
        value = tl.where(valid, tl.maximum(value.to(tl.float32), _LOWEST), _EMPTY)
        if RACED:
            value = _race_score(value, index, key, scale, greedy)
        newcomer = value
        if MAX_CHILDREN > 1:
            hub0, index0, value, index = _push(newcomer > hub0, value, index, hub0, index0)
        if MAX_CHILDREN > 2:
            hub1, index1, value, index = _push(newcomer > hub1, value, index, hub1, index1)
        if MAX_CHILDREN > 3:
            hub2, index2, value, index = _push(newcomer > hub2, value, index, hub2, index2)
        if not RACED:
            mass = join(value, race, mass, scale)
            if SHARPENED:
                sharp_mass = join(value, race, sharp_mass, race_scale)
        race, winner, _, _ = _push(newcomer > race, value, index, race, winner)

    # Hubs: the best over all lanes, MAX_CHILDREN - 1 times. A row with fewer children takes fewer.
    row_peak = 0.0
    threshold0 = 0.0
    threshold1 = 0.0
    threshold2 = 0.0
    hub_token0 = -1
    hub_token1 = -1
    hub_token2 = -1
    if MAX_CHILDREN > 1:
        row_peak, _ = _best(hub0, index0)
    for rank in tl.static_range(MAX_CHILDREN - 1):
        best, token = _best(hub0, index0)
        is_hub = rank < num_children - 1
        taken = is_hub & (index0 == token)
        hub0 = tl.where(taken, hub1, hub0)
        index0 = tl.where(taken, index1, index0)
        hub1 = tl.where(taken, hub2, hub1)
        index1 = tl.where(taken, index2, index1)
        hub2 = tl.where(taken, _EMPTY, hub2)
        index2 = tl.where(taken, _NO_INDEX, index2)
        token = tl.where(is_hub, token, -1)
        weight = tl.where(is_hub, tl.exp((best - row_peak) * scale), 0.0)
        if rank == 0:
            hub_token0 = token
            threshold0 = weight
            threshold1 = weight
            threshold2 = weight
        if rank == 1:
            hub_token1 = token
            threshold1 += weight
            threshold2 += weight
        if rank == 2:
            hub_token2 = token
            threshold2 += weight

    # The lists' remaining entries are no hubs either.
    for rank in tl.static_range(MAX_CHILDREN - 1):
        value, index = hub0, index0
        if rank == 1:
            value, index = hub1, index1
        if rank == 2:
            value, index = hub2, index2
        if not RACED:
            mass = join(value, race, mass, scale)
            if SHARPENED:
                sharp_mass = join(value, race, sharp_mass, race_scale)
        race, winner, _, _ = _insert(value, index, race, winner)
    leader, sampled = _best(race, winner)
    if not RACED:
        sampled = _draw_off_hubs(
            logits_ptr + row * logits_stride,
            (hub_token0, hub_token1, hub_token2),
            race,
            sharp_mass if SHARPENED else mass,
            sampled,
            (temperature != 0.0) & (leader > _LOWEST),
            race_scale,
            key,
            vocab_size,
            BLOCK_SIZE,
            LANE_SIZE,
        )

    # Rank of the hub in slot 0; num_children - 1 where the sampled child is.
    main = num_children - 1
    if ORDERED and MAX_CHILDREN > 1:
        draw = uniform(row_key(seed, position, node, LABEL))
        # A row without any possible token is drafted as a greedy one.
        draw = tl.where(
            greedy | (row_peak == _LOWEST),
            0.0,
            draw * (threshold2 + tl.sum(mass * tl.exp((race - row_peak) * scale), axis=0)),
        )
        passed = (threshold0 <= draw).to(tl.int32)
        passed += (threshold1 <= draw).to(tl.int32)
        passed += (threshold2 <= draw).to(tl.int32)
        # Ranks past the last hub repeat its threshold.
        main = tl.minimum(passed, num_children - 1)

    last_slot = num_children - 1
    sample_slot = last_slot
    if ORDERED:
        sample_slot = tl.where(main == last_slot, 0, last_slot)
    for rank in tl.static_range(MAX_CHILDREN - 1):
        token = hub_token0
        if rank == 1:
            token = hub_token1
        if rank == 2:
            token = hub_token2
        slot = rank
        if ORDERED:
            slot = tl.where(main == rank, 0, rank + (main > rank).to(tl.int32))
        # Ranks without a hub write -1 past the last child.
        slot = tl.where(rank < num_children - 1, slot, rank + 1)
        tl.store(row_tokens_ptr + slot, token.to(tl.int64))
    tl.store(row_tokens_ptr + sample_slot, sampled.to(tl.int64))
    tl.store(sample_slot_ptr + row, tl.zeros_like(sample_slot) if RACED else sample_slot)


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
    """`child_sampling.sample_children` on the GPU, without argument checks."""
    num_rows, vocab_size = logits.shape
    tokens = torch.empty(num_rows, max_children, dtype=torch.int64, device=logits.device)
    sample_slots = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows:
        _sample_children_kernel[(num_rows,)](
            tokens,
            sample_slots,
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
            **constants(BUILTIN_RULES[rule]),
            MAX_CHILDREN=max_children,
            SHARPENED=sharpening != 1.0,
            BLOCK_SIZE=rng.LANES,
            LANE_SIZE=triton.next_power_of_2(triton.cdiv(vocab_size, rng.LANES)),
            num_warps=NUM_WARPS,
        )
    return Children(tokens, sample_slots)


def constants(rule: Rule) -> dict[str, bool]:
    """What the kernel must know of a rule."""
    return {
        "ORDERED": rule.ordered_slots,
        "RACED": rule.is_recursive,
        "REPLACED": rule.replaces,
    }
