# SPDX-License-Identifier: Apache-2.0
"""Child sampling and tree verification, compiled by Numba: the CPU's versions of our own kernels.

They draw the same numbers as the Triton kernels and the PyTorch references, and walk one request
at a time: on rows this small a PyTorch operation costs more than the arithmetic.
"""

from typing import NamedTuple, TypeVar

import numpy as np
import torch

from vllm_spechub.cpu.tree_kernels.node import (
    LOWEST,
    choose_recursive,
    choose_spechub,
    softmax,
    spechub_distribution,
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
from vllm_spechub.triton_kernels.arguments import (
    Children,
    Drafts,
    Requests,
    TargetRows,
    TreeTables,
    VerifiedPaths,
)
from vllm_spechub.triton_kernels.constants import MAX_CHILDREN
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES, Rule


class Scratch(NamedTuple):
    """Rows to work in. [size] each; the second field is the first one's memory, as int32."""

    race: np.ndarray
    race_bits: np.ndarray
    spare: np.ndarray
    spare_bits: np.ndarray
    uniforms: np.ndarray


class Traits(NamedTuple):
    """What the compiled loops must know of a rule; see `triton_kernels.rules`."""

    recursive: bool
    replaces: bool
    ordered: bool
    sharpening: np.float32


@jit
def _scratch(size):
    race, spare = np.empty(size, f32), np.empty(size, f32)
    return Scratch(race, race.view(i32), spare, spare.view(i32), np.empty(size, f32))


@jit
def _first(scratch, size):
    """The first `size` elements of every row."""
    return Scratch(
        scratch.race[:size],
        scratch.race_bits[:size],
        scratch.spare[:size],
        scratch.spare_bits[:size],
        scratch.uniforms[:size],
    )


@jit_sums
def _race(
    # [size]
    logits,
    scale,
    key,
    start,
    # of [size]; on return `race` has scores whose largest is a draw from softmax(logits * scale)
    scratch,
):
    race = scratch.race
    exponential_row(key, start, race, scratch.race_bits, scratch.spare, scratch.uniforms)
    log_row(race, scratch.race_bits, scratch.spare)
    for i in range(logits.shape[0]):
        race[i] = max(logits[i] * scale - race[i], LOWEST)


@jit
def _draw_all(
    # [size]; used up
    logits,
    scale,
    greedy,
    key,
    replaces,
    # [num_children], written
    children,
    # of [size]
    scratch,
):
    """Children drawn from the draft one after the other: independently or without replacement."""
    size, race = logits.shape[0], scratch.race
    if greedy or logits[argmax(logits)] == LOWEST:
        race[:] = logits
        replaces = False
    else:
        _race(logits, scale, key, 0, scratch)
    for slot in range(children.shape[0]):
        if replaces and slot > 0:
            _race(logits, scale, key, slot * size, scratch)
        children[slot] = argmax(race)
        race[children[slot]] = -np.inf


@jit
def _draw_off_hubs(
    # [size], -inf for the hubs
    logits,
    scale,
    key,
    # of [size]
    scratch,
):
    """A draw from softmax(logits * scale), by lanes as in `rng.draw`."""
    size, race = logits.shape[0], scratch.race
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
    _race(peaks, scale, key, 0, _first(scratch, lanes))
    for lane in range(lanes):
        if peaks[lane] == -np.inf:
            race[lane] = -np.inf
    lane = argmax(race[:lanes])
    if depth == 1:
        return lane
    own = np.full(depth, -np.inf, f32)
    for place in range((size - lane + lanes - 1) // lanes):
        own[place] = logits[lane + place * lanes]
    _race(own, scale, key, rng.LANES, _first(scratch, depth))
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
    # of [size]
    scratch,
):
    """The hubs and one token sampled off them; returns the sampled one's slot."""
    size, num_hubs, race = logits.shape[0], children.shape[0] - 1, scratch.race
    hub_logits = np.empty(MAX_CHILDREN, f32)
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
            sample = _draw_off_hubs(logits, scale * sharpening, child_key, scratch)
    children[num_hubs] = sample
    if not ordered or num_hubs == 0:
        return num_hubs

    main = 0
    if not greedy and hub_logits[0] > LOWEST:
        peak = hub_logits[0]
        for i in range(size):
            race[i] = (logits[i] - peak) * scale
        exp_row(race, scratch.spare, scratch.spare_bits)
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
    # [num_rows] each
    node_ids,
    num_children,
    requests,
    traits,
    # -1 throughout, written
    drawn,
):
    size = logits.shape[1]
    row, scratch = np.empty(size, f32), _scratch(size)
    for r in range(logits.shape[0]):
        req = requests.req_idx[r]
        if req < 0:
            continue
        temperature, seed = requests.temperature[req], requests.seeds[req]
        greedy = temperature == f32(0.0)
        scale = f32(1.0) if greedy else f32(1.0) / temperature
        for i in range(size):
            row[i] = max(logits[r, i], LOWEST)
        children = drawn.tokens[r, : num_children[r]]
        position = requests.root_positions[r]
        key = row_key(seed, position, node_ids[r], rng.CHILD)
        if traits.recursive:
            _draw_all(row, scale, greedy, key, traits.replaces, children, scratch)
            drawn.sample_slots[r] = 0
        else:
            drawn.sample_slots[r] = _draw_spechub(
                row,
                scale,
                greedy,
                traits.sharpening,
                key,
                row_key(seed, position, node_ids[r], rng.LABEL),
                traits.ordered,
                children,
                scratch,
            )


@jit
def _emit(
    # [size] unnormalised probabilities
    weights,
    key,
    # of [size]
    scratch,
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
    part = _first(scratch, lanes)
    noise = part.race
    exponential_row(key, 0, noise, part.race_bits, part.spare, part.uniforms)
    for lane in range(lanes):
        noise[lane] = masses[lane] / noise[lane]
    lane = argmax(noise)
    if depth == 1:
        return lane
    places = (size - lane + lanes - 1) // lanes
    part = _first(scratch, places)
    noise = part.race
    exponential_row(key, rng.LANES, noise, part.race_bits, part.spare, part.uniforms)
    for place in range(places):
        noise[place] = weights[lane + place * lanes] / noise[place]
    return lane + lanes * argmax(noise)


@jit
def _walk_trees(
    target_rows,
    drafts,
    # [num_reqs], where each request's drafts are
    draft_idx,
    requests,
    tree,
    traits,
    # -1 throughout, written
    paths,
):
    """From the root while children are accepted."""
    size = target_rows.logits.shape[1]
    target, draft, spare = np.empty(size, f32), np.empty(size, f32), np.empty(size, f32)
    work = _scratch(size)
    scratch, scratch_bits = work.spare, work.spare_bits
    hub_probs, gain = np.empty(MAX_CHILDREN, f32), np.empty(MAX_CHILDREN, f32)
    for r in range(target_rows.row_start.shape[0]):
        req = requests.req_idx[r]
        greedy = target_rows.temperature[req] == f32(0.0)
        scale = f32(1.0) if greedy else f32(1.0) / target_rows.temperature[req]
        node, depth = np.int64(0), 0
        paths.path[r, 0] = 0
        while True:
            logits = target_rows.logits[target_rows.row_start[r] + node]
            first, count = np.int64(tree.first_child[node]), np.int64(tree.num_children[node])
            leaf = count == 0 or first + count - 1 > target_rows.num_nodes[r]
            children = target_rows.node_tokens[
                target_rows.row_start[r] + first : target_rows.row_start[r] + first + count
            ]
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
                    inner = tree.internal_index[node]
                    draft[:] = drafts.logits[draft_idx[r], inner]
                    draw = uniform(
                        row_key(requests.seeds[req], requests.root_positions[r], node, rng.ACCEPT)
                    )
                    temperature = requests.temperature[req]
                    if traits.recursive:
                        slot = choose_recursive(
                            target,
                            draft,
                            temperature,
                            children,
                            traits.replaces,
                            draw,
                            spare,
                            scratch,
                            scratch_bits,
                        )
                    else:
                        sample_slot = drafts.sample_slots[req, inner]
                        hub_mass, off_mass = spechub_distribution(
                            draft,
                            temperature,
                            traits.sharpening,
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
                            traits.ordered,
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
            paths.tokens[r, depth] = children[slot]
            node = first + slot
            depth += 1
            paths.path[r, depth] = node
        if not greedy:
            key = row_key(requests.seeds[req], requests.root_positions[r], node, rng.RESIDUAL)
            best = _emit(target, key, work)
        paths.tokens[r, depth] = best
        paths.num_emitted[r] = depth + 1


@jit
def _traverse_trees(
    target_rows,
    drafts,
    # [num_reqs], where each request's drafts are
    draft_idx,
    requests,
    tree,
    traits,
    # -1 throughout, written
    paths,
):
    """Depth first, each node after its children, until one is accepted."""
    size = target_rows.logits.shape[1]
    target, draft, spare = np.empty(size, f32), np.empty(size, f32), np.empty(size, f32)
    work = _scratch(size)
    scratch, scratch_bits = work.spare, work.spare_bits
    hub_probs, gain = np.empty(MAX_CHILDREN, f32), np.empty(MAX_CHILDREN, f32)
    width = tree.first_child.shape[0]
    parents, depths = np.zeros(width, i32), np.zeros(width, i32)
    for node in range(width):
        for child in range(
            tree.first_child[node], tree.first_child[node] + tree.num_children[node]
        ):
            parents[child] = node
            depths[child] = depths[node] + 1
    # the path acceptance that a node is visited with; the probability of accepting it once its
    # children have failed
    visit, leave = np.empty(width, f32), np.empty(width, f32)
    for r in range(target_rows.row_start.shape[0]):
        req = requests.req_idx[r]
        greedy = target_rows.temperature[req] == f32(0.0)
        scale = f32(1.0) if greedy else f32(1.0) / target_rows.temperature[req]
        visit[0] = f32(1.0)
        node, arriving, emitting = np.int64(0), True, False
        best = np.int64(-1)
        while True:
            first, count = np.int64(tree.first_child[node]), np.int64(tree.num_children[node])
            leaf = count == 0 or first + count - 1 > target_rows.num_nodes[r]
            if emitting or (arriving and not leaf and visit[node] > f32(0.0)):
                # look at the rows of a node: for its children, or for the bonus token
                target[:] = target_rows.logits[target_rows.row_start[r] + node]
                if greedy:
                    best = argmax(target)
                else:
                    softmax(target, scale, scratch, scratch_bits)
                if emitting and (greedy or leaf):
                    break
                children = target_rows.node_tokens[
                    target_rows.row_start[r] + first : target_rows.row_start[r] + first + count
                ]
                inner = tree.internal_index[node]
                sample_slot = np.int64(drafts.sample_slots[req, inner])
                leave[node] = visit[node]
                if greedy:
                    for s in range(count):
                        visit[first + s] = f32(1.0) if children[s] == best else f32(0.0)
                else:
                    for i in range(size):
                        target[i] *= visit[node]
                    draft[:] = drafts.logits[draft_idx[r], inner]
                    ordered = False
                    for s in range(1, count):
                        ordered = (
                            ordered or tree.subtree_sizes[first + s] != tree.subtree_sizes[first]
                        )
                    hub_mass, off_mass = spechub_distribution(
                        draft,
                        requests.temperature[req],
                        traits.sharpening,
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
            draw = uniform(
                row_key(requests.seeds[req], requests.root_positions[r], node, rng.ACCEPT)
            )
            if node == 0 or draw < leave[node]:
                emitting = True
                continue
            # on to the next sibling: the sampled child was first, the others follow by slot
            parent = np.int64(parents[node])
            first = np.int64(tree.first_child[parent])
            sample_slot = np.int64(drafts.sample_slots[req, tree.internal_index[parent]])
            following = 0 if node - first == sample_slot else node - first + 1
            if following == sample_slot:
                following += 1
            arriving = following < tree.num_children[parent]
            node = first + following if arriving else parent

        depth = depths[node]
        paths.num_emitted[r] = depth + 1
        if not greedy:
            key = row_key(requests.seeds[req], requests.root_positions[r], node, rng.RESIDUAL)
            best = _emit(target, key, work)
        paths.tokens[r, depth] = best
        paths.path[r, 0] = 0
        while depth > 0:
            paths.path[r, depth] = node
            depth -= 1
            paths.tokens[r, depth] = target_rows.node_tokens[target_rows.row_start[r] + node]
            node = np.int64(parents[node])


T = TypeVar("T", Children, Drafts, Requests, TargetRows, TreeTables, VerifiedPaths)


def _rows(logits: torch.Tensor) -> torch.Tensor:
    """Logits as the compiled loops take them: float32, contiguous."""
    return logits.float().contiguous()


def _traits(rule: Rule, sharpening: float) -> Traits:
    return Traits(rule.is_recursive, rule.replaces, rule.ordered_slots, f32(sharpening))


def _arrays(tensors: T) -> T:
    """The same fields as NumPy arrays."""
    return tensors._make(field.numpy() for field in tensors)


def _requests(requests: Requests) -> Requests:
    """As the loops are compiled for them."""
    return _arrays(
        requests._replace(
            req_idx=requests.req_idx.long(), root_positions=requests.root_positions.long()
        )
    )


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
    """`triton_kernels.child_sampling.sample_children` on the CPU."""
    drawn = Children(
        torch.full((len(logits), max_children), -1, dtype=torch.int64),
        torch.full((len(logits),), -1, dtype=torch.int32),
    )
    _sample_children(
        _rows(logits).numpy(),
        node_ids.int().numpy(),
        num_children.int().numpy(),
        _requests(requests),
        _traits(BUILTIN_RULES[rule], sharpening),
        _arrays(drawn),
    )
    return drawn


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
    children,
    # the buffers, written
    drafts,
    # [max_num_reqs, num_nodes], written
    tokens,
):
    row = 0
    for req in idx_mapping:
        column = first_child
        for i in range(num_children.shape[0]):
            drafts.logits[req, first_internal + i] = logits[row]
            drafts.sample_slots[req, first_internal + i] = children.sample_slots[row]
            for slot in range(num_children[i]):
                tokens[req, column] = children.tokens[row, slot]
                column += 1
            row += 1


def write_children(
    state: DraftState,
    level: DraftLevel,
    # [num_reqs] int64
    idx_mapping: torch.Tensor,
    # [num_reqs * num_expanded, vocab_size]
    logits: torch.Tensor,
    # of the same rows
    children: Children,
) -> None:
    """`DraftState.write_children` on the CPU."""
    if logits.dtype == torch.float32 == state.drafts.logits.dtype:
        _write_children(
            idx_mapping.numpy(),
            level.internal.start,
            level.children.start,
            level.num_children_np,
            _rows(logits).numpy(),
            _arrays(children),
            _arrays(state.drafts),
            state.tokens.numpy(),
        )
    else:
        state.write_children(level, idx_mapping, logits, children)


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
    """`triton_kernels.verification.verify_tree` on the CPU."""
    num_reqs = len(target.row_start)
    paths = VerifiedPaths(
        torch.full((num_reqs, max_depth + 1), -1, dtype=torch.int64),
        torch.empty(num_reqs, dtype=torch.int32),
        torch.full((num_reqs, max_depth + 1), -1, dtype=torch.int32),
    )
    draft_logits, draft_idx = drafts.logits, requests.req_idx.long()
    if draft_logits.dtype != torch.float32:  # convert this batch's drafts, not every request's
        draft_logits, draft_idx = draft_logits[draft_idx], torch.arange(num_reqs)
    traits = BUILTIN_RULES[rule]
    verify = _traverse_trees if traits.is_leaf_to_root else _walk_trees
    verify(
        _arrays(
            TargetRows(
                _rows(target.logits),
                target.temperature,
                target.row_start.int(),
                target.num_nodes.int(),
                target.node_tokens.long(),
            )
        ),
        _arrays(drafts._replace(logits=_rows(draft_logits))),
        draft_idx.numpy(),
        _requests(requests),
        _arrays(tree),
        _traits(traits, sharpening),
        _arrays(paths),
    )
    return paths
