# SPDX-License-Identifier: Apache-2.0
"""Child sampling and tree verification, compiled by Numba: the CPU's versions of our own kernels.

They draw the same numbers as the Triton kernels and the PyTorch references, and walk one request
at a time: on rows this small a PyTorch operation costs more than the arithmetic.
"""

import numpy as np
import torch

from vllm_spechub.cpu.tree_kernels.node import (
    LOWEST,
    choose_recursive,
    choose_spechub,
    softmax,
    spechub_law,
    spechub_parts,
    visit_spechub,
)
from vllm_spechub.cpu.tree_kernels.vector_math import (
    argmax,
    exp_row,
    exponential_row,
    f32,
    i32,
    jit,
    jit_sums,
    log_row,
    row_key,
    uniform,
)
from vllm_spechub.rules.draft_state import DraftLevel, DraftState
from vllm_spechub.triton_kernels import rng
from vllm_spechub.triton_kernels.rules import ORDERED_SLOTS, RECURSIVE


@jit_sums
def _race(
    # [size] each
    logits,
    scale,
    key,
    start,
    # [size], written: scores whose largest is a draw from softmax(logits * scale)
    race,
    race_bits,
    # [size] each
    scratch,
    uniforms,
):
    exponential_row(key, start, race, race_bits, scratch, uniforms)
    log_row(race, race_bits, scratch)
    for i in range(logits.shape[0]):
        race[i] = max(logits[i] * scale - race[i], LOWEST)


@jit
def _draw_all(
    # [size]; used up
    logits,
    scale,
    greedy,
    key,
    replaced,
    # [num_children], written
    children,
    # [size] each
    race,
    race_bits,
    scratch,
    uniforms,
):
    """Children drawn from the draft one after the other: independently or without replacement."""
    size = logits.shape[0]
    if greedy or logits[argmax(logits)] == LOWEST:
        race[:] = logits
        replaced = False
    else:
        _race(logits, scale, key, 0, race, race_bits, scratch, uniforms)
    for slot in range(children.shape[0]):
        if replaced and slot > 0:
            _race(logits, scale, key, slot * size, race, race_bits, scratch, uniforms)
        children[slot] = argmax(race)
        race[children[slot]] = -np.inf


@jit
def _draw_off_hubs(
    # [size], -inf for the hubs
    logits,
    scale,
    key,
    # [size] each
    race,
    race_bits,
    scratch,
    uniforms,
):
    """A draw from softmax(logits * scale), by lanes as in `rng.draw`."""
    size = logits.shape[0]
    lanes = min(size, rng.LANES)
    depth = (size + lanes - 1) // lanes
    # [lanes] each, as if a lane were a token with its mass
    peaks, masses = logits, race[:0]
    if depth > 1:
        peaks, masses = np.full(lanes, -np.inf, f32), np.zeros(lanes, f32)
        for i in range(size):
            peaks[i % lanes] = max(peaks[i % lanes], logits[i])
        for i in range(size):
            if logits[i] > -np.inf:
                masses[i % lanes] += np.exp((logits[i] - peaks[i % lanes]) * scale)
        for lane in range(lanes):
            if masses[lane] > f32(0.0):
                peaks[lane] += np.log(masses[lane]) / scale
    _race(peaks, scale, key, 0, race[:lanes], race_bits[:lanes], scratch[:lanes], uniforms[:lanes])
    for lane in range(lanes):
        if peaks[lane] == -np.inf:
            race[lane] = -np.inf
    lane = argmax(race[:lanes])
    if depth == 1:
        return lane
    own = np.full(depth, -np.inf, f32)
    for place in range((size - lane + lanes - 1) // lanes):
        own[place] = logits[lane + place * lanes]
    _race(
        own,
        scale,
        key,
        rng.LANES,
        race[:depth],
        race_bits[:depth],
        scratch[:depth],
        uniforms[:depth],
    )
    for place in range(depth):
        if own[place] == -np.inf:
            race[place] = -np.inf
    return lane + lanes * argmax(race[:depth])


@jit_sums
def _draw_spechub(
    # [size]; used up
    logits,
    scale,
    greedy,
    sharpening,
    child_key,
    label_key,
    ordered,
    # [num_children], written
    children,
    # [size] each
    race,
    race_bits,
    scratch,
    scratch_bits,
    uniforms,
):
    """The hubs and one token sampled off them; returns the sampled one's slot."""
    size, num_hubs = logits.shape[0], children.shape[0] - 1
    hub_logits = np.empty(4, f32)
    for rank in range(num_hubs):
        hub = argmax(logits)
        hub_logits[rank] = logits[hub]
        children[rank] = hub
        logits[hub] = -np.inf
    if greedy:
        sample = argmax(logits)
    else:
        sample = argmax(logits)
        if logits[sample] > LOWEST:
            sample = _draw_off_hubs(
                logits, scale * sharpening, child_key, race, race_bits, scratch, uniforms
            )
    children[num_hubs] = sample
    if not ordered or num_hubs == 0:
        return num_hubs

    main = 0
    if not greedy and hub_logits[0] > LOWEST:
        peak = hub_logits[0]
        for i in range(size):
            race[i] = (logits[i] - peak) * scale
        exp_row(race, scratch, scratch_bits)
        total = f32(0.0)
        for i in range(size):
            total += race[i]
        for rank in range(num_hubs):
            total += np.exp((hub_logits[rank] - peak) * scale)
        draw = uniform(label_key) * total
        threshold = f32(0.0)
        main = num_hubs
        for rank in range(num_hubs):
            threshold += np.exp((hub_logits[rank] - peak) * scale)
            if draw < threshold:
                main = rank
                break
    # those before the main child move back by one to let it in front
    front = children[main]
    for slot in range(main, 0, -1):
        children[slot] = children[slot - 1]
    children[0] = front
    return 0 if main == num_hubs else num_hubs


@jit
def _sample_children(
    # [num_rows, vocab_size]
    logits,
    # [max_num_reqs] each
    temperature,
    seeds,
    # [num_rows] each
    req_idx,
    root_positions,
    node_ids,
    num_children,
    raced,
    replaced,
    ordered,
    sharpening,
    # [num_rows, max_children], -1 throughout
    tokens,
    # [num_rows], -1 throughout
    sample_slots,
):
    size = logits.shape[1]
    row, race = np.empty(size, f32), np.empty(size, f32)
    race_bits = race.view(i32)
    scratch, uniforms = np.empty(size, f32), np.empty(size, f32)
    scratch_bits = scratch.view(i32)
    for r in range(logits.shape[0]):
        req = req_idx[r]
        if req < 0:
            continue
        greedy = temperature[req] == f32(0.0)
        scale = f32(1.0) if greedy else f32(1.0) / temperature[req]
        for i in range(size):
            row[i] = max(logits[r, i], LOWEST)
        children = tokens[r, : num_children[r]]
        key = row_key(seeds[req], root_positions[r], node_ids[r], rng.CHILD)
        if raced:
            _draw_all(
                row, scale, greedy, key, replaced, children, race, race_bits, scratch, uniforms
            )
            sample_slots[r] = 0
        else:
            sample_slots[r] = _draw_spechub(
                row,
                scale,
                greedy,
                sharpening,
                key,
                row_key(seeds[req], root_positions[r], node_ids[r], rng.LABEL),
                ordered,
                children,
                race,
                race_bits,
                scratch,
                scratch_bits,
                uniforms,
            )


@jit
def _emit(
    # [size] unnormalised probabilities
    weights,
    key,
    # [size] each
    noise,
    noise_bits,
    scratch,
    uniforms,
):
    """`rng.draw`: a token drawn from the weights."""
    size = weights.shape[0]
    lanes = min(size, rng.LANES)
    depth = (size + lanes - 1) // lanes
    masses = weights
    if depth > 1:
        masses = np.zeros(lanes, f32)
        for i in range(size):
            masses[i % lanes] += weights[i]
    exponential_row(key, 0, noise[:lanes], noise_bits[:lanes], scratch[:lanes], uniforms[:lanes])
    for lane in range(lanes):
        noise[lane] = masses[lane] / noise[lane]
    lane = argmax(noise[:lanes])
    if depth == 1:
        return lane
    places = (size - lane + lanes - 1) // lanes
    exponential_row(
        key, rng.LANES, noise[:places], noise_bits[:places], scratch[:places], uniforms[:places]
    )
    for place in range(places):
        noise[place] = weights[lane + place * lanes] / noise[place]
    return lane + lanes * argmax(noise[:places])


@jit
def _walk_trees(
    # [num_rows, vocab_size]
    target_logits,
    # [num_reqs] each
    row_start,
    num_nodes,
    # [num_rows]
    node_tokens,
    # [num_drafts, num_internal, vocab_size]
    draft_logits,
    # [num_reqs], each request's draft
    draft_idx,
    # [max_num_reqs, num_internal]
    sample_slots,
    # [num_reqs]
    req_idx,
    # [max_num_reqs] each
    target_temperature,
    draft_temperature,
    seeds,
    # [num_reqs]
    root_positions,
    # [num_tree_nodes] each
    first_child,
    num_children,
    internal_index,
    raced,
    replaced,
    ordered,
    sharpening,
    # [num_reqs, max_depth + 1] each, -1 throughout
    tokens,
    path,
    # [num_reqs]
    num_emitted,
):
    """From the root while children are accepted."""
    size = target_logits.shape[1]
    target, draft, spare = np.empty(size, f32), np.empty(size, f32), np.empty(size, f32)
    scratch, uniforms = np.empty(size, f32), np.empty(size, f32)
    scratch_bits, draft_bits = scratch.view(i32), draft.view(i32)
    hub_probs, gain = np.empty(4, f32), np.empty(4, f32)
    for r in range(row_start.shape[0]):
        req = req_idx[r]
        greedy = target_temperature[req] == f32(0.0)
        scale = f32(1.0) if greedy else f32(1.0) / target_temperature[req]
        node, depth = np.int64(0), 0
        path[r, 0] = 0
        while True:
            logits = target_logits[row_start[r] + node]
            first, count = np.int64(first_child[node]), np.int64(num_children[node])
            leaf = count == 0 or first + count - 1 > num_nodes[r]
            children = node_tokens[row_start[r] + first : row_start[r] + first + count]
            slot = count
            if greedy:
                best = argmax(logits)
                if not leaf:
                    for s in range(count):
                        if children[s] == best:
                            slot = s
                            break
            else:
                target[:] = logits
                softmax(target, scale, scratch, scratch_bits)
                if not leaf:
                    inner = internal_index[node]
                    draft[:] = draft_logits[draft_idx[r], inner]
                    draw = uniform(row_key(seeds[req], root_positions[r], node, rng.ACCEPT))
                    temperature = draft_temperature[req]
                    if raced:
                        slot = choose_recursive(
                            target,
                            draft,
                            temperature,
                            children,
                            replaced,
                            draw,
                            spare,
                            scratch,
                            scratch_bits,
                        )
                    else:
                        sample_slot = sample_slots[req, inner]
                        hub_mass, off_mass = spechub_law(
                            draft,
                            temperature,
                            sharpening,
                            children,
                            sample_slot,
                            hub_probs[:count],
                            spare,
                            scratch,
                            scratch_bits,
                        )
                        accept_sample, accept_main, residual_mass = spechub_parts(
                            target,
                            draft,
                            children,
                            sample_slot,
                            ordered,
                            hub_probs[:count],
                            hub_mass,
                            off_mass,
                            gain[:count],
                            scratch,
                        )
                        slot = choose_spechub(
                            target,
                            children,
                            sample_slot,
                            accept_sample,
                            accept_main,
                            gain[:count],
                            residual_mass,
                            scratch,
                            draw,
                        )
            if leaf or slot == count:
                break
            tokens[r, depth] = children[slot]
            node = first + slot
            depth += 1
            path[r, depth] = node
        if not greedy:
            key = row_key(seeds[req], root_positions[r], node, rng.RESIDUAL)
            best = _emit(target, key, draft, draft_bits, scratch, uniforms)
        tokens[r, depth] = best
        num_emitted[r] = depth + 1


@jit
def _traverse_trees(
    # [num_rows, vocab_size]
    target_logits,
    # [num_reqs] each
    row_start,
    num_nodes,
    # [num_rows]
    node_tokens,
    # [num_drafts, num_internal, vocab_size]
    draft_logits,
    # [num_reqs], each request's draft
    draft_idx,
    # [max_num_reqs, num_internal]
    sample_slots,
    # [num_reqs]
    req_idx,
    # [max_num_reqs] each
    target_temperature,
    draft_temperature,
    seeds,
    # [num_reqs]
    root_positions,
    # [num_tree_nodes] each
    first_child,
    num_children,
    internal_index,
    # [num_tree_nodes]
    subtree_sizes,
    sharpening,
    # [num_reqs, max_depth + 1] each, -1 throughout
    tokens,
    path,
    # [num_reqs]
    num_emitted,
):
    """Depth first, each node after its children, until one is accepted."""
    size = target_logits.shape[1]
    target, draft, spare = np.empty(size, f32), np.empty(size, f32), np.empty(size, f32)
    scratch, uniforms = np.empty(size, f32), np.empty(size, f32)
    scratch_bits, draft_bits = scratch.view(i32), draft.view(i32)
    hub_probs, gain = np.empty(4, f32), np.empty(4, f32)
    width = first_child.shape[0]
    parents, depths = np.zeros(width, i32), np.zeros(width, i32)
    for node in range(width):
        for child in range(first_child[node], first_child[node] + num_children[node]):
            parents[child] = node
            depths[child] = depths[node] + 1
    # the path acceptance that a node is visited with; the probability of accepting it once its
    # children have failed
    visit, leave = np.empty(width, f32), np.empty(width, f32)
    for r in range(row_start.shape[0]):
        req = req_idx[r]
        greedy = target_temperature[req] == f32(0.0)
        scale = f32(1.0) if greedy else f32(1.0) / target_temperature[req]
        visit[0] = f32(1.0)
        node, arriving, emitting = np.int64(0), True, False
        best = np.int64(-1)
        while True:
            first, count = np.int64(first_child[node]), np.int64(num_children[node])
            leaf = count == 0 or first + count - 1 > num_nodes[r]
            if emitting or (arriving and not leaf and visit[node] > f32(0.0)):
                # look at the rows of a node: for its children, or for the bonus token
                target[:] = target_logits[row_start[r] + node]
                if greedy:
                    best = argmax(target)
                else:
                    softmax(target, scale, scratch, scratch_bits)
                if emitting and (greedy or leaf):
                    break
                children = node_tokens[row_start[r] + first : row_start[r] + first + count]
                inner = internal_index[node]
                sample_slot = np.int64(sample_slots[req, inner])
                leave[node] = visit[node]
                if greedy:
                    for s in range(count):
                        visit[first + s] = f32(1.0) if children[s] == best else f32(0.0)
                else:
                    for i in range(size):
                        target[i] *= visit[node]
                    draft[:] = draft_logits[draft_idx[r], inner]
                    ordered = False
                    for s in range(1, count):
                        ordered = ordered or subtree_sizes[first + s] != subtree_sizes[first]
                    hub_mass, off_mass = spechub_law(
                        draft,
                        draft_temperature[req],
                        sharpening,
                        children,
                        sample_slot,
                        hub_probs[:count],
                        spare,
                        scratch,
                        scratch_bits,
                    )
                    accept_sample, accept_main, residual_mass = spechub_parts(
                        target,
                        draft,
                        children,
                        sample_slot,
                        ordered,
                        hub_probs[:count],
                        hub_mass,
                        off_mass,
                        gain[:count],
                        scratch,
                    )
                    if emitting:
                        # without a residual, by rounding only, the target is emitted from
                        if residual_mass > f32(0.0):
                            target[:] = scratch
                        break
                    leave[node] = visit_spechub(
                        sample_slot,
                        ordered,
                        visit[node],
                        accept_sample,
                        accept_main,
                        gain[:count],
                        residual_mass,
                        visit[first : first + count],
                    )
                node = first + sample_slot
                continue
            if arriving:
                leave[node] = visit[node]
                arriving = False
            draw = uniform(row_key(seeds[req], root_positions[r], node, rng.ACCEPT))
            if node == 0 or draw < leave[node]:
                emitting = True
                continue
            # on to the next sibling: the sampled child was first, the others follow by slot
            parent = np.int64(parents[node])
            first = np.int64(first_child[parent])
            sample_slot = np.int64(sample_slots[req, internal_index[parent]])
            following = 0 if node - first == sample_slot else node - first + 1
            if following == sample_slot:
                following += 1
            arriving = following < num_children[parent]
            node = first + following if arriving else parent

        depth = depths[node]
        num_emitted[r] = depth + 1
        if not greedy:
            key = row_key(seeds[req], root_positions[r], node, rng.RESIDUAL)
            best = _emit(target, key, draft, draft_bits, scratch, uniforms)
        tokens[r, depth] = best
        path[r, 0] = 0
        while depth > 0:
            path[r, depth] = node
            depth -= 1
            tokens[r, depth] = node_tokens[row_start[r] + node]
            node = np.int64(parents[node])


def _rows(logits: torch.Tensor) -> np.ndarray:
    """Logits as the compiled loops take them: float32, contiguous."""
    return logits.float().contiguous().numpy()


def sample_children(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    # [max_num_reqs]
    temperature: torch.Tensor,
    # [max_num_reqs]
    seeds: torch.Tensor,
    # [num_rows]
    req_idx: torch.Tensor,
    # [num_rows]
    root_positions: torch.Tensor,
    # [num_rows]
    node_ids: torch.Tensor,
    # [num_rows]
    num_children: torch.Tensor,
    *,
    rule: str,
    max_children: int,
    sharpening: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`triton_kernels.child_sampling.sample_children` on the CPU."""
    tokens = torch.full((len(logits), max_children), -1, dtype=torch.int64)
    sample_slots = torch.full((len(logits),), -1, dtype=torch.int32)
    _sample_children(
        _rows(logits),
        temperature.numpy(),
        seeds.numpy(),
        req_idx.long().numpy(),
        root_positions.long().numpy(),
        node_ids.int().numpy(),
        num_children.int().numpy(),
        rule in RECURSIVE,
        rule == "rrs",
        rule in ORDERED_SLOTS,
        f32(sharpening),
        tokens.numpy(),
        sample_slots.numpy(),
    )
    return tokens, sample_slots


@jit
def _write_children(
    # [num_reqs] int64
    idx_mapping,
    first_internal,
    first_child,
    # [num_expanded] int32
    num_children,
    # [num_reqs * num_expanded, vocab_size]
    logits,
    # [num_reqs * num_expanded, max_children]
    tokens,
    # [num_reqs * num_expanded]
    sample_slots,
    # the buffers, written
    all_logits,
    all_tokens,
    all_sample_slots,
):
    row = 0
    for req in idx_mapping:
        column = first_child
        for i in range(num_children.shape[0]):
            all_logits[req, first_internal + i] = logits[row]
            all_sample_slots[req, first_internal + i] = sample_slots[row]
            for slot in range(num_children[i]):
                all_tokens[req, column] = tokens[row, slot]
                column += 1
            row += 1


def write_children(
    state: DraftState,
    level: DraftLevel,
    # [num_reqs] int64
    idx_mapping: torch.Tensor,
    # [num_reqs * num_expanded, vocab_size]
    logits: torch.Tensor,
    # [num_reqs * num_expanded, max_children] int64
    tokens: torch.Tensor,
    # [num_reqs * num_expanded] int32
    sample_slots: torch.Tensor,
) -> None:
    """`DraftState.write_children` on the CPU."""
    if logits.dtype == torch.float32 == state.logits.dtype:
        _write_children(
            idx_mapping.numpy(),
            level.internal.start,
            level.children.start,
            level.num_children_np,
            _rows(logits),
            tokens.numpy(),
            sample_slots.numpy(),
            state.logits.numpy(),
            state.tokens.numpy(),
            state.sample_slots.numpy(),
        )
    else:
        state.write_children(level, idx_mapping, logits, tokens, sample_slots)


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
    # [num_tree_nodes]
    subtree_sizes: torch.Tensor,
    *,
    max_depth: int,
    rule: str,
    sharpening: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`triton_kernels.verification.verify_tree` on the CPU."""
    num_reqs = len(row_start)
    tokens = torch.full((num_reqs, max_depth + 1), -1, dtype=torch.int64)
    path = torch.full((num_reqs, max_depth + 1), -1, dtype=torch.int32)
    num_emitted = torch.empty(num_reqs, dtype=torch.int32)
    req_idx = draft_idx = req_idx.long()
    if draft_logits.dtype != torch.float32:  # convert this batch's drafts, not every request's
        draft_logits, draft_idx = draft_logits[req_idx], torch.arange(num_reqs)
    arguments = (
        _rows(target_logits),
        row_start.int().numpy(),
        num_nodes.int().numpy(),
        node_tokens.long().numpy(),
        _rows(draft_logits),
        draft_idx.numpy(),
        sample_slots.numpy(),
        req_idx.numpy(),
        target_temperature.numpy(),
        draft_temperature.numpy(),
        seeds.numpy(),
        root_positions.long().numpy(),
        first_child.numpy(),
        num_children.numpy(),
        internal_index.numpy(),
    )
    results = (tokens.numpy(), path.numpy(), num_emitted.numpy())
    if rule == "traversal":
        _traverse_trees(*arguments, subtree_sizes.numpy(), f32(sharpening), *results)
    else:
        flags = (rule in RECURSIVE, rule == "rrs", rule == "ordered")
        _walk_trees(*arguments, *flags, f32(sharpening), *results)
    return tokens, num_emitted, path
