# SPDX-License-Identifier: Apache-2.0
"""Leaf-to-root verification in Triton: one program per request, which visits its tree depth first.

No stack is needed. What every node is visited with, and left with, is kept in two vectors over the
tree's nodes, and a node's parent is found in the tables.
"""

import triton
import triton.language as tl

from ..rng_device import ACCEPT, RESIDUAL, row_key, uniform
from . import device
from .device import MAX_CHILDREN, at


@triton.jit
def _parent(node, nodes, first_child, num_children):
    above = (first_child <= node) & (node < first_child + num_children)
    return tl.sum(tl.where(above, nodes, 0), axis=0)


@triton.jit
def _visit_children(
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
    acceptance,
    ordered,
    vocab_size,
    SHARPENED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """`node_rules.traversal_outcome`: what each child is visited with, [MAX_CHILDREN], and what the
    node is accepted with once they have failed. Also p and w of `device.spechub_distribution`."""
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
        True,
        SHARPENED,
        BLOCK_SIZE,
    )
    accept_sample, accept_main, hub_gain, lanes, _ = device.spechub_parts(
        target_ptr,
        draft_ptr,
        children,
        sample_slot,
        distribution,
        acceptance,
        ordered,
        vocab_size,
        True,
        BLOCK_SIZE,
    )
    residual_mass = tl.sum(lanes, axis=0)
    rest = residual_mass + (1.0 - acceptance)
    # The pool's mass when each hub's turn comes, summed from the end: nothing cancels.
    left = tl.cumsum(hub_gain, axis=0, reverse=True) + rest
    visit = hub_gain / tl.where(left == 0.0, 1.0, left)
    # The hub in slot 0 has its turn before the pool, which holds none of it if that fails.
    visit = tl.where((slots == 0) & ordered, accept_main, visit)
    visit = tl.where(slots == sample_slot, accept_sample, visit)
    # A pool without mass is reached by rounding only, and then with acceptance 1.
    stuck = residual_mass <= 0.0
    leave = residual_mass / tl.where(stuck, 1.0, rest)
    leave = tl.where(stuck, tl.where(acceptance == 1.0, 1.0, 0.0), leave)
    p, w, _, _ = distribution
    return visit, leave, p, w


@triton.jit
def traverse_kernel(
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
    # [num_tree_nodes]
    subtree_sizes_ptr,
    num_tree_nodes,
    MAX_NODES: tl.constexpr,
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
    temperature = tl.load(target_temperature_ptr + req)
    greedy = temperature == 0.0
    target_scale = 1.0 / tl.where(greedy, 1.0, temperature)
    draft_temperature = tl.load(draft_temperature_ptr + req)
    seed = tl.load(seeds_ptr + req)
    position = tl.load(root_positions_ptr + out)
    draft_logits_ptr += req * draft_logits_req_stride
    sample_slots_ptr += req * sample_slots_stride
    slots = tl.arange(0, MAX_CHILDREN)

    # [MAX_NODES] each
    nodes = tl.arange(0, MAX_NODES)
    in_tree = nodes < num_tree_nodes
    first_child = tl.load(first_child_ptr + nodes, mask=in_tree, other=0)
    num_children = tl.load(num_children_ptr + nodes, mask=in_tree, other=0)
    # A node that lost a child to truncation is a leaf.
    present = first_child + num_children - 1 <= tl.load(num_nodes_ptr + out)
    num_children = tl.where(present, num_children, 0)
    # The path acceptance that a node is visited with; the probability of accepting it once its
    # children have failed.
    visit = tl.where(nodes == 0, 1.0, 0.0)
    leave = tl.zeros([MAX_NODES], tl.float32)
    # What makes p and w of the rows of a visited node, to emit without another pass for them.
    target_peaks = leave
    target_inverses = leave
    draft_peaks = leave
    draft_inverses = leave
    # The best token of the last row that a greedy request read.
    best = tl.full([], -1, tl.int32)

    node = tl.full([], 0, tl.int32)
    arriving = tl.full([], 1, tl.int32)
    walking = tl.full([], 1, tl.int32)
    while walking != 0:
        if arriving != 0:
            acceptance = at(visit, nodes, node)
            first = at(first_child, nodes, node)
            count = at(num_children, nodes, node)
            left = acceptance
            if (count > 0) & (acceptance > 0.0):
                target_ptr = target_logits_ptr + (root_row + node) * target_logits_stride
                internal = tl.load(internal_index_ptr + node).to(tl.int64)
                children = tl.load(
                    node_tokens_ptr + root_row + first + slots, mask=slots < count, other=-1
                ).to(tl.int32)
                sample_slot = tl.load(sample_slots_ptr + internal)
                if greedy:
                    # The child that holds the best token is accepted, whatever the draft.
                    best = device.emit(
                        target_ptr, vocab_size, 0, target_scale, True, BLOCK_SIZE, LANE_SIZE
                    )
                    chances = tl.where(children == best, 1.0, 0.0)
                else:
                    # [MAX_CHILDREN], the first one's also past the last
                    sizes = tl.load(subtree_sizes_ptr + first + tl.where(slots < count, slots, 0))
                    chances, left, p, w = _visit_children(
                        target_ptr,
                        draft_logits_ptr + internal * draft_logits_node_stride,
                        children,
                        sample_slot,
                        target_scale,
                        draft_temperature,
                        sharpening,
                        acceptance,
                        tl.max(sizes, axis=0) != tl.min(sizes, axis=0),
                        vocab_size,
                        SHARPENED,
                        BLOCK_SIZE,
                    )
                    target_peaks = tl.where(nodes == node, p[0], target_peaks)
                    target_inverses = tl.where(nodes == node, p[1], target_inverses)
                    draft_peaks = tl.where(nodes == node, w[0], draft_peaks)
                    draft_inverses = tl.where(nodes == node, w[1], draft_inverses)
                for slot in tl.static_range(MAX_CHILDREN):
                    is_child = (nodes == first + slot) & (slot < count)
                    visit = tl.where(is_child, at(chances, slots, slot), visit)
                leave = tl.where(nodes == node, left, leave)
                node = first + sample_slot
            else:
                leave = tl.where(nodes == node, left, leave)
                arriving = tl.zeros_like(arriving)
        else:
            draw = uniform(row_key(seed, position, node, ACCEPT))
            if (draw < at(leave, nodes, node)) | (node == 0):
                walking = tl.zeros_like(walking)
            else:
                # On to the next sibling: the sampled child was first, the others follow by slot.
                parent = _parent(node, nodes, first_child, num_children)
                first = at(first_child, nodes, parent)
                internal = tl.load(internal_index_ptr + parent)
                sample_slot = tl.load(sample_slots_ptr + internal)
                following = tl.where(node - first == sample_slot, 0, node - first + 1)
                following += (following == sample_slot).to(tl.int32)
                more = following < at(num_children, nodes, parent)
                arriving = more.to(tl.int32)
                node = tl.where(more, first + following, parent)

    first = at(first_child, nodes, node)
    count = at(num_children, nodes, node)
    target_ptr = target_logits_ptr + (root_row + node) * target_logits_stride
    key = row_key(seed, position, node, RESIDUAL)
    if count == 0:
        token = device.emit(
            target_ptr, vocab_size, key, target_scale, greedy, BLOCK_SIZE, LANE_SIZE
        )
    elif greedy:
        # Of the nodes that a greedy request reads, each accepts the next: this is the last one.
        token = best
    else:
        internal = tl.load(internal_index_ptr + node).to(tl.int64)
        children = tl.load(
            node_tokens_ptr + root_row + first + slots, mask=slots < count, other=-1
        ).to(tl.int32)
        sample_slot = tl.load(sample_slots_ptr + internal)
        draft_ptr = draft_logits_ptr + internal * draft_logits_node_stride
        p = (at(target_peaks, nodes, node), at(target_inverses, nodes, node), target_scale)
        scale = device.sample_scale(draft_temperature, sharpening)
        w = (at(draft_peaks, nodes, node), at(draft_inverses, nodes, node), scale)
        acceptance = at(visit, nodes, node)
        lanes = device.residual_lanes(
            target_ptr,
            draft_ptr,
            children,
            sample_slot,
            p,
            w,
            acceptance,
            vocab_size,
            BLOCK_SIZE,
        )
        token = device.emit_residual(
            target_ptr,
            draft_ptr,
            children,
            sample_slot,
            p,
            w,
            acceptance,
            lanes,
            vocab_size,
            key,
            BLOCK_SIZE,
            LANE_SIZE,
        )

    depth = tl.full([], 0, tl.int32)
    above = node
    while above > 0:
        above = _parent(above, nodes, first_child, num_children)
        depth += 1
    tl.store(tokens_ptr + depth, token.to(tl.int64))
    tl.store(num_emitted_ptr + out, depth + 1)
    while depth > 0:
        tl.store(path_ptr + depth, node)
        tl.store(tokens_ptr + depth - 1, tl.load(node_tokens_ptr + root_row + node).to(tl.int64))
        node = _parent(node, nodes, first_child, num_children)
        depth -= 1
    tl.store(path_ptr, 0)
