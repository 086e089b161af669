# SPDX-License-Identifier: Apache-2.0
"""Tree verification in Triton: one program per request, which reads the rows on its walk only."""

import torch
import triton
import triton.language as tl

from .. import rng
from ..arguments import Drafts, Requests, TargetRows, TreeTables, VerifiedPaths
from ..rng_device import ACCEPT, RESIDUAL, row_key, uniform
from ..rules import BUILTIN_RULES, Rule
from . import device
from .device import MAX_CHILDREN, NO_SLOT
from .traversal_kernel import traverse_kernel

NUM_WARPS = 16


@triton.jit
def _verify_spechub(
    # [vocab_size]
    target_ptr,
    # [vocab_size]
    draft_ptr,
    # [MAX_CHILDREN]
    children,
    sample_slot,
    target_scale,
    draft_temperature,
    sharpening,
    vocab_size,
    draw,
    residual_key,
    ORDERED: tl.constexpr,
    SHARPENED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LANE_SIZE: tl.constexpr,
):
    """The accepted slot, or NO_SLOT, and the token to emit in that case.

    The mathematics are `node_rules.node_outcome`.
    """
    slots = tl.arange(0, MAX_CHILDREN)
    distribution = device.spechub_distribution(
        target_ptr,
        draft_ptr,
        children,
        sample_slot,
        target_scale,
        draft_temperature,
        sharpening,
        vocab_size,
        ORDERED,
        SHARPENED,
        BLOCK_SIZE,
    )
    accept_sample, accept_main, hub_gain, emitted_lanes, sample_target = device.spechub_parts(
        target_ptr,
        draft_ptr,
        children,
        sample_slot,
        distribution,
        1.0,
        True,
        vocab_size,
        ORDERED,
        BLOCK_SIZE,
    )
    failed = 1.0 - accept_sample
    pool = failed * (1.0 - accept_main)
    emitted_mass = tl.sum(emitted_lanes, axis=0)
    pool_mass = tl.sum(hub_gain, axis=0) + emitted_mass
    # A pool without mass is reached by rounding only: accept the sampled child. If the target rules
    # that token out, emit from the target instead.
    stuck = pool_mass <= 0.0
    pool_scale = pool / tl.where(stuck, 1.0, pool_mass)
    accept = hub_gain * pool_scale + tl.where(slots == 0, failed * accept_main, 0.0)
    certain = accept_sample + tl.where(stuck & (sample_target > 0.0), pool, 0.0)
    accept = tl.where(slots == sample_slot, certain, accept)
    reject = tl.where(stuck & (sample_target <= 0.0), pool, emitted_mass * pool_scale)

    threshold = tl.cumsum(accept, axis=0)
    total = tl.max(threshold, axis=0) + reject
    # Slots passed over; all of them on rejection.
    slot = tl.sum((threshold <= draw * total).to(tl.int32), axis=0)
    token = tl.full([], -1, tl.int32)
    if slot == NO_SLOT:
        p, w, _, _ = distribution
        token = device.emit_residual(
            target_ptr,
            draft_ptr,
            children,
            sample_slot,
            p,
            w,
            1.0,
            emitted_lanes,
            vocab_size,
            residual_key,
            BLOCK_SIZE,
            LANE_SIZE,
        )
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
    sharpening,
    # whether slot 0 is distributed as the draft
    ORDERED: tl.constexpr,
    # whether children are tried one after the other; and may be equal
    RECURSIVE: tl.constexpr,
    REPLACED: tl.constexpr,
    SHARPENED: tl.constexpr,
    # the lanes of `rng.draw`, and at least as many as a lane has tokens
    BLOCK_SIZE: tl.constexpr,
    LANE_SIZE: tl.constexpr,
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
    slots = tl.arange(0, MAX_CHILDREN)

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
        ).to(tl.int32)
        target_ptr = target_logits_ptr + (root_row + node) * target_logits_stride
        residual_key = row_key(seed, position, node, RESIDUAL)
        if greedy or num_children == 0:
            token = device.emit(
                target_ptr, vocab_size, residual_key, target_scale, greedy, BLOCK_SIZE, LANE_SIZE
            )
            slot = tl.min(tl.where(children == token, slots, NO_SLOT), axis=0)
        else:
            internal = tl.load(internal_index_ptr + node).to(tl.int64)
            draft_ptr = (
                draft_logits_ptr
                + req * draft_logits_req_stride
                + internal * draft_logits_node_stride
            )
            draw = uniform(row_key(seed, position, node, ACCEPT))
            if RECURSIVE:
                slot, token = device.verify_recursive(
                    target_ptr,
                    draft_ptr,
                    children,
                    target_scale,
                    draft_temperature,
                    vocab_size,
                    draw,
                    residual_key,
                    REPLACED,
                    BLOCK_SIZE,
                    LANE_SIZE,
                )
            else:
                slot, token = _verify_spechub(
                    target_ptr,
                    draft_ptr,
                    children,
                    tl.load(sample_slots_ptr + req * sample_slots_stride + internal),
                    target_scale,
                    draft_temperature,
                    sharpening,
                    vocab_size,
                    draw,
                    residual_key,
                    ORDERED,
                    SHARPENED,
                    BLOCK_SIZE,
                    LANE_SIZE,
                )
        accepted = tl.sum(tl.where(slots == slot, children, 0), axis=0)
        tl.store(tokens_ptr + depth, tl.where(slot < NO_SLOT, accepted, token).to(tl.int64))
        node = tl.where(slot < NO_SLOT, first + slot, -1)
        depth += 1
    tl.store(num_emitted_ptr + out, depth)


def verify_tree(
    target: TargetRows,
    drafts: Drafts,
    requests: Requests,
    tree: TreeTables,
    *,
    max_depth: int,
    rule: str,
    sharpening: float = 1.0,
) -> VerifiedPaths:
    """`verification.verify_tree` on the GPU, without argument checks."""
    num_reqs = target.row_start.shape[0]
    device = target.logits.device
    tokens = torch.full((num_reqs, max_depth + 1), -1, dtype=torch.int64, device=device)
    path = torch.full((num_reqs, max_depth + 1), -1, dtype=torch.int32, device=device)
    num_emitted = torch.empty(num_reqs, dtype=torch.int32, device=device)
    if num_reqs == 0:
        return VerifiedPaths(tokens, num_emitted, path)
    vocab_size = target.logits.shape[1]
    arguments = (
        tokens,
        num_emitted,
        path,
        target.logits,
        target.logits.stride(0),
        target.row_start,
        target.num_nodes,
        target.node_tokens,
        drafts.logits,
        drafts.logits.stride(0),
        drafts.logits.stride(1),
        drafts.sample_slots,
        drafts.sample_slots.stride(0),
        requests.req_idx,
        target.temperature,
        requests.temperature,
        requests.seeds,
        requests.root_positions,
        tree.first_child,
        tree.num_children,
        tree.internal_index,
        max_depth,
        vocab_size,
        float(sharpening),
    )
    options = {
        "SHARPENED": sharpening != 1.0,
        "BLOCK_SIZE": rng.LANES,
        "LANE_SIZE": triton.next_power_of_2(triton.cdiv(vocab_size, rng.LANES)),
        "num_warps": NUM_WARPS,
    }
    traits = BUILTIN_RULES[rule]
    if traits.is_leaf_to_root:
        num_tree_nodes = tree.first_child.shape[0]
        max_nodes = triton.next_power_of_2(num_tree_nodes)
        traverse_kernel[(num_reqs,)](
            *arguments, tree.subtree_sizes, num_tree_nodes, MAX_NODES=max_nodes, **options
        )
    else:
        _verify_tree_kernel[(num_reqs,)](*arguments, **constants(traits), **options)
    return VerifiedPaths(tokens, num_emitted, path)


def constants(rule: Rule) -> dict[str, bool]:
    """What the root-to-leaf kernel must know of a rule."""
    return {
        "ORDERED": rule.ordered_slots,
        "RECURSIVE": rule.is_recursive,
        "REPLACED": rule.replaces,
    }
