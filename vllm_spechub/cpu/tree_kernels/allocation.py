# SPDX-License-Identifier: Apache-2.0
"""Level allocation, compiled by Numba: the CPU's version of `triton_kernels.level_allocation`."""

import numpy as np
import torch

from vllm_spechub.cpu.tree_kernels.sampling import (
    CONFIDENT,
    FIRST_SAMPLE_LOSS,
    SAMPLE_SHARES,
    arrays,
    rows_of,
    scratch,
    traits_of,
    weigh,
)
from vllm_spechub.cpu.tree_kernels.vector_math import LOWEST, argmax, f32, finite_row, jit
from vllm_spechub.triton_kernels import constants
from vllm_spechub.triton_kernels.arguments import GrownTrees, Requests
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES

MAX_CHILDREN = constants.MAX_CHILDREN
LONE_SAMPLE = f32(constants.LONE_SAMPLE)


@jit
def _top_shares(
    # [vocab_size] logits, LOWEST for masked tokens; used up
    row,
    temperature,
    # [MAX_CHILDREN], written
    shares,
    # [vocab_size]
    weights,
    work,
):
    """The largest probabilities, falling; 0 where no token is possible."""
    shares[:] = f32(0.0)
    peak = row[argmax(row)]
    if peak == LOWEST:
        return
    scale = f32(1.0) if temperature == f32(0.0) else f32(1.0) / temperature
    total = weigh(row, peak, scale, weights, work)
    for place in range(min(MAX_CHILDREN, row.shape[0])):
        best = argmax(weights)
        shares[place] = weights[best] / total
        weights[best] = f32(-1.0)


@jit
def _expected(
    # [MAX_CHILDREN]
    shares,
    count,
    greedy,
    traits,
    # [MAX_CHILDREN], written
    slots,
):
    """What the child in each slot is expected to be accepted with, 0 past the last; returns the
    sum."""
    num_hubs = 0
    for place in range(count):
        limit = traits.confident_hubs if shares[place] > CONFIDENT else traits.always_hubs
        if greedy or place < min(limit, count - traits.never_hubs):
            num_hubs += 1
        else:
            break
    off_hubs = f32(1.0)
    for place in range(num_hubs):
        off_hubs -= shares[place]
    off_hubs = max(off_hubs, f32(0.0))
    value = f32(0.0)
    slots[:] = f32(0.0)
    for place in range(count):
        if place < num_hubs:
            expected = shares[place]
        elif count == 1:
            expected = LONE_SAMPLE + (f32(1.0) - LONE_SAMPLE) * shares[0] * shares[0]
        else:
            expected = SAMPLE_SHARES[place - num_hubs] * off_hubs
            if place == num_hubs:
                expected *= f32(1.0) - FIRST_SAMPLE_LOSS * off_hubs
        value += expected
        slot = place
        while traits.ranks_subtrees and slot > 0 and slots[slot - 1] < expected:
            slots[slot] = slots[slot - 1]
            slot -= 1
        slots[slot] = expected
    return value


@jit
def _allocate(
    # [num_reqs * width, vocab_size]
    logits,
    # [num_reqs] int64
    req_idx,
    # [max_num_reqs]
    temperature,
    # tables [max_num_reqs, num_tree_nodes], written
    tables,
    masks,
    reach,
    first_node,
    width,
    width_below,
    traits,
):
    size = logits.shape[1]
    row, weights, work = np.empty(size, f32), np.empty(size, f32), scratch(size)
    shares, gains = np.empty((width, MAX_CHILDREN), f32), np.empty((width, MAX_CHILDREN), f32)
    slots, counts = np.empty(MAX_CHILDREN, f32), np.empty(width, np.int64)
    most = min(MAX_CHILDREN, width_below)
    for r in range(req_idx.shape[0]):
        req = req_idx[r]
        if req < 0:
            continue
        counts[:] = 0
        for place in range(width):
            finite_row(logits[r * width + place], row)
            _top_shares(row, temperature[req], shares[place], weights, work)
            greedy = temperature[req] == f32(0.0) or shares[place, 0] == f32(0.0)
            best, falling = f32(0.0), f32(np.inf)
            for k in range(1, most + 1):
                value = _expected(shares[place], k, greedy, traits, slots)
                falling = min(falling, max(value - best, f32(0.0)))
                best = max(best, value)
                gains[place, k - 1] = reach[req, first_node + place] * falling
        for _ in range(width_below):
            chosen = -1
            for place in range(width):
                # gains never rise: a node's next child is its best
                if counts[place] < most and (
                    chosen < 0 or gains[place, counts[place]] > gains[chosen, counts[chosen]]
                ):
                    chosen = place
            counts[chosen] += 1
        child = first_node + width
        for place in range(width):
            node = first_node + place
            greedy = temperature[req] == f32(0.0) or shares[place, 0] == f32(0.0)
            _expected(shares[place], counts[place], greedy, traits, slots)
            tables.first_child[req, node] = child
            tables.num_children[req, node] = counts[place]
            for slot in range(counts[place]):
                tables.parents[req, child] = node
                masks[req, child] = masks[req, node] | (np.int64(1) << np.int64(child))
                reach[req, child] = reach[req, node] * slots[slot]
                child += 1


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
    """`triton_kernels.level_allocation.allocate_children` on the CPU."""
    _allocate(
        rows_of(logits).numpy(),
        requests.req_idx.long().numpy(),
        requests.temperature.numpy(),
        arrays(trees.tables),
        trees.ancestor_masks.numpy(),
        trees.reach.numpy(),
        first_node,
        width,
        width_below,
        traits_of(BUILTIN_RULES[rule], 1.0),
    )
