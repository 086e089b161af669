# SPDX-License-Identifier: Apache-2.0
"""Child sampling and tree verification, compiled by Numba: the CPU's versions of our own kernels.

They draw the same numbers as the Triton kernels and the PyTorch references, and walk one request
at a time: on rows this small a PyTorch operation costs more than the arithmetic.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from vllm_spechub.cpu.tree_kernels.node import (
    MAX_CHILDREN,
    is_sampled,
    next_slot,
    softmax,
    visit_children,
)
from vllm_spechub.cpu.tree_kernels.vector_math import (
    LOWEST,
    argmax,
    exp_row,
    exponential_row,
    f32,
    finite_row,
    i32,
    jit,
    jit_sums,
    row_key,
    uniform,
)
from vllm_spechub.rules.draft_state import DraftLevel, DraftState
from vllm_spechub.triton_kernels import constants, rng
from vllm_spechub.triton_kernels.arguments import (
    Children,
    Drafts,
    KeptRows,
    Requests,
    TargetRows,
    TreeTables,
    VerifiedPaths,
)
from vllm_spechub.triton_kernels.child_sampling.reference import keep_rows
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES, Rule

CONFIDENT = f32(constants.CONFIDENT)
FIRST_SAMPLE_LOSS = f32(constants.FIRST_SAMPLE_LOSS)
SAMPLE_SHARES = np.array(constants.SAMPLE_SHARES, f32)

LANES = rng.LANES
"""A constant of the compiled code, which is kept on disk: whoever replaces that of `rng` replaces
it for other kernels only."""


class Scratch(NamedTuple):
    """Rows to work in. [size] each; `noise_bits` and `spare_bits` are their rows' memory as
    int32."""

    noise: np.ndarray
    noise_bits: np.ndarray
    spare: np.ndarray
    spare_bits: np.ndarray
    uniforms: np.ndarray


class Traits(NamedTuple):
    """What the compiled loops must know of a rule; see `triton_kernels.rules`."""

    # the values of `Hubs`
    never_hubs: int
    always_hubs: int
    confident_hubs: int
    replaces: bool
    ranks_subtrees: bool
    leaf_to_root: bool
    sharpening: np.float32


@jit
def scratch(size):
    noise, spare = np.empty(size, f32), np.empty(size, f32)
    return Scratch(noise, noise.view(i32), spare, spare.view(i32), np.empty(size, f32))


@jit
def _exponentials(key, start, count, work):
    """The first `count` elements of `work.noise`: `rng.exponential` of the hashes from `start`
    on."""
    exponential_row(
        key,
        start,
        work.noise[:count],
        work.noise_bits[:count],
        work.spare[:count],
        work.uniforms[:count],
    )


@jit
def _draw(
    # [size] unnormalised probabilities
    weights,
    key,
    number,
    work,
):
    """`rng.draw`: a token drawn from the weights."""
    size = weights.shape[0]
    lanes = min(size, LANES)
    depth = (size + lanes - 1) // lanes
    first = number * rng.DRAW_STRIDE
    masses = weights
    if depth > 1:
        masses = np.zeros(lanes, f32)
        for start in range(0, size, lanes):
            for lane in range(min(lanes, size - start)):
                masses[lane] += weights[start + lane]
    _exponentials(key, first, lanes, work)
    for lane in range(lanes):
        work.noise[lane] = masses[lane] / work.noise[lane]
    lane = argmax(work.noise[:lanes])
    if depth == 1:
        return lane
    places = (size - lane + lanes - 1) // lanes
    _exponentials(key, first + LANES, places, work)
    for place in range(places):
        work.noise[place] = weights[lane + place * lanes] / work.noise[place]
    return lane + lanes * argmax(work.noise[:places])


@jit
def _best(
    # [size]
    row,
):
    """`rng.best`: the largest element, of a tie the first lane's, and its first."""
    size = row.shape[0]
    lanes = min(size, LANES)
    top = row[argmax(row)]
    for lane in range(lanes):
        for i in range(lane, size, lanes):
            if row[i] == top:
                return i
    return 0


@jit_sums
def weigh(
    # [size] logits, -inf for what is taken out
    row,
    peak,
    scale,
    # [size], written: exp((row - peak) * scale), 0 for masked tokens
    weights,
    work,
):
    """Returns what the weights add up to."""
    for i in range(row.shape[0]):
        weights[i] = (row[i] - peak) * scale
    exp_row(weights, work.spare, work.spare_bits)
    total = f32(0.0)
    for i in range(row.shape[0]):
        total += weights[i]
    return total


@jit
def _draft_node(
    # [size] logits, LOWEST for masked tokens; used up
    row,
    temperature,
    key,
    num_children,
    traits,
    # [num_children], written
    children,
    # [size]
    weights,
    work,
):
    """One row of `child_sampling.reference.sample_children`; returns the samples' bits."""
    peak = row[argmax(row)]
    greedy = temperature == f32(0.0) or peak == LOWEST
    scale = f32(1.0) if temperature == f32(0.0) else f32(1.0) / temperature
    total, off_hubs = f32(1.0), f32(1.0)
    if not greedy:
        total = weigh(row, peak, scale, weights, work)
    tokens, expected = np.empty(MAX_CHILDREN, np.int64), np.empty(MAX_CHILDREN, f32)
    num_hubs, bits = 0, 0
    for place in range(num_children):
        best = _best(row)
        logit = row[best]
        prob = f32(0.0) if greedy else np.exp((logit - peak) * scale) / total
        limit = traits.confident_hubs if prob > CONFIDENT else traits.always_hubs
        hub = place < min(limit, num_children - traits.never_hubs) and num_hubs == place
        hub = greedy or hub
        tokens[place], expected[place] = best, prob
        if hub:
            num_hubs += 1
        elif logit > LOWEST:
            if num_hubs == place:
                off_hubs = weigh(row, peak, scale, weights, work) / total
            weigh(row, logit, scale * traits.sharpening, weights, work)
            tokens[place] = _draw(weights, key, place, work)
            bits |= 1 << place
            expected[place] = SAMPLE_SHARES[place - num_hubs] * off_hubs
            if place == num_hubs:
                expected[place] *= f32(1.0) - FIRST_SAMPLE_LOSS * off_hubs
        if not (traits.replaces and is_sampled(bits, place)):
            row[tokens[place]] = -np.inf
    slot_bits = 0
    for place in range(num_children):
        slot = place
        if traits.ranks_subtrees and not greedy:
            slot = 0
            for other in range(num_children):
                first = other < place
                if is_sampled(bits, other) != is_sampled(bits, place):
                    first = is_sampled(bits, other)
                ahead = expected[other] > expected[place]
                slot += ahead or (first and expected[other] == expected[place])
        children[slot] = tokens[place]
        slot_bits |= ((bits >> place) & 1) << slot
    return slot_bits


@jit
def _sample_children(
    # [num_rows, vocab_size]
    logits,
    # [num_rows] each
    node_ids,
    num_children,
    requests,
    traits,
    # [max_num_reqs, num_internal, size], written; empty to keep nothing
    kept,
    # [num_rows], read if rows are kept
    internal,
    # -1 throughout, written
    drawn,
):
    size = logits.shape[1]
    row, weights, work = np.empty(size, f32), np.empty(size, f32), scratch(size)
    for r in range(logits.shape[0]):
        req = requests.req_idx[r]
        if req < 0:
            continue
        if len(kept) and requests.temperature[req] != f32(0.0):
            kept[req, internal[r]] = logits[r]
        finite_row(logits[r], row)
        key = row_key(requests.seeds[req], requests.root_positions[r], node_ids[r], rng.CHILD)
        drawn.sampled[r] = _draft_node(
            row,
            requests.temperature[req],
            key,
            num_children[r],
            traits,
            drawn.tokens[r],
            weights,
            work,
        )


class _Request(NamedTuple):
    """One request's part of the batch."""

    # [num_nodes, vocab_size] logits, and [num_nodes] tokens, from its root on
    rows: np.ndarray
    tokens: np.ndarray
    # of the target; 0 is greedy
    temperature: np.float32
    # drafted nodes that are verified
    num_nodes: int
    # [num_internal, vocab_size] and [num_internal], as drafted
    drafted: np.ndarray
    sampled: np.ndarray
    draft_scale: np.float32
    seed: int
    position: int


class _Rows(NamedTuple):
    """What is remembered of the nodes of a tree, and of the rows of the last one that was read."""

    # [num_tree_nodes]: what a node is visited with; what it is accepted with once its children
    # failed
    visit: np.ndarray
    leave: np.ndarray
    # [vocab_size]: the node's target, and what its residual loses a multiple of
    target: np.ndarray
    draft: np.ndarray
    work: Scratch


@jit
def _children(node, request, tree):
    """First, number and samples' bits of a node's children. A node that lost one to truncation has
    none."""
    first, count = np.int64(tree.first_child[node]), np.int64(tree.num_children[node])
    if count == 0 or first + count - 1 > request.num_nodes:
        return first, np.int64(0), np.int64(0)
    return first, count, np.int64(request.sampled[tree.internal_index[node]])


@jit
def _coin(node, request):
    return uniform(row_key(request.seed, request.position, node, rng.ACCEPT))


@jit
def _look(node, acceptance, request, tree, replaces, rows):
    """Read a node's rows: what its children are visited with, and the node left with. Returns the
    multiple of `rows.draft` that its residual loses, and the best token of a greedy request."""
    first, count, bits = _children(node, request, tree)
    rows.leave[node] = acceptance
    if request.temperature == f32(0.0):
        best = np.int64(argmax(request.rows[node]))
        for child in range(first, first + count):
            rows.visit[child] = f32(1.0) if request.tokens[child] == best else f32(0.0)
        return f32(0.0), best
    finite_row(request.rows[node], rows.target)
    scale = f32(1.0) / request.temperature
    softmax(rows.target, scale, rows.work.spare, rows.work.spare_bits)
    rows.draft[:] = f32(0.0)
    if count == 0:
        return f32(0.0), np.int64(0)
    finite_row(request.drafted[tree.internal_index[node]], rows.draft)
    rows.leave[node], weight = visit_children(
        rows.target,
        rows.draft,
        request.draft_scale,
        request.tokens[first : first + count],
        bits,
        acceptance,
        replaces,
        rows.visit[first : first + count],
        rows.work.spare,
        rows.work.spare_bits,
    )
    return weight, np.int64(0)


@jit
def _root_to_leaf(request, tree, replaces, rows):
    """A child is decided when its turn comes. Returns the path's last node and what `_look` says of
    it."""
    node = np.int64(0)
    while True:
        weight, best = _look(node, f32(1.0), request, tree, replaces, rows)
        first, count, bits = _children(node, request, tree)
        slot = next_slot(-1, bits, count)
        while slot >= 0 and not _coin(first + slot, request) < rows.visit[first + slot]:
            slot = next_slot(slot, bits, count)
        if slot < 0:
            return node, weight, best
        node = first + slot


@jit
def _leaf_to_root(request, tree, replaces, rows):
    """Depth first, a node is decided after its children. Returns as `_root_to_leaf`."""
    node, arriving, read = np.int64(0), True, np.int64(-1)
    weight, best = f32(0.0), np.int64(0)
    rows.visit[0] = f32(1.0)
    while True:
        if arriving:
            rows.leave[node] = rows.visit[node]
            first, count, bits = _children(node, request, tree)
            if count > 0 and rows.visit[node] > f32(0.0):
                weight, best = _look(node, rows.visit[node], request, tree, replaces, rows)
                read = node
                node = first + next_slot(-1, bits, count)
                continue
        # its children, if any, have failed
        if node == 0 or _coin(node, request) < rows.leave[node]:
            break
        parent = np.int64(tree.parents[node])
        first, count, bits = _children(parent, request, tree)
        slot = next_slot(node - first, bits, count)
        arriving = slot >= 0
        node = first + slot if arriving else parent
    if read != node:
        weight, best = _look(node, rows.visit[node], request, tree, replaces, rows)
    return node, weight, best


@jit
def _verify_trees(
    target_rows,
    drafts,
    # [num_reqs], where each request's drafts are
    draft_idx,
    requests,
    # tables with a row for each request's drafts, or one row for all
    trees,
    traits,
    # -1 throughout, written
    paths,
):
    size, width = target_rows.logits.shape[1], trees.internal_index.shape[0]
    rows = _Rows(
        np.ones(width, f32),
        np.empty(width, f32),
        np.empty(size, f32),
        np.empty(size, f32),
        scratch(size),
    )
    for r in range(target_rows.row_start.shape[0]):
        req, start = requests.req_idx[r], target_rows.row_start[r]
        own = req if trees.first_child.shape[0] > 1 else 0
        tree = TreeTables(
            trees.first_child[own],
            trees.num_children[own],
            trees.internal_index,
            trees.parents[own],
        )
        draft_temperature = requests.temperature[req]
        request = _Request(
            target_rows.logits[start:],
            target_rows.node_tokens[start:],
            target_rows.temperature[req],
            target_rows.num_nodes[r],
            drafts.logits[draft_idx[r]],
            drafts.sampled[req],
            traits.sharpening / (draft_temperature if draft_temperature > f32(0.0) else f32(1.0)),
            requests.seeds[req],
            requests.root_positions[r],
        )
        acceptance = f32(1.0)
        if traits.leaf_to_root:
            node, weight, token = _leaf_to_root(request, tree, traits.replaces, rows)
            acceptance = rows.visit[node]
        else:
            node, weight, token = _root_to_leaf(request, tree, traits.replaces, rows)
        if request.temperature != f32(0.0):
            for i in range(size):
                left = acceptance * rows.target[i] - weight * rows.draft[i]
                rows.target[i] = max(left, f32(0.0))
            key = row_key(request.seed, request.position, node, rng.RESIDUAL)
            token = _draw(rows.target, key, 0, rows.work)
        paths.num_emitted[r] = 1 + _write_path(
            node, token, request.tokens, tree, paths.tokens[r], paths.path[r]
        )


@jit
def _write_path(node, last_token, tokens, tree, emitted, path):
    """The nodes down to the last one, their tokens, and the last token. Returns the node's
    depth."""
    depth, above = 0, node
    while above > 0:
        above = np.int64(tree.parents[above])
        depth += 1
    emitted[depth] = last_token
    path[0] = 0
    for at in range(depth, 0, -1):
        path[at] = node
        emitted[at - 1] = tokens[node]
        node = np.int64(tree.parents[node])
    return depth


T = TypeVar("T", Children, Drafts, Requests, TargetRows, TreeTables, VerifiedPaths)


def rows_of(logits: torch.Tensor) -> torch.Tensor:
    """Logits as the compiled loops take them: float32, contiguous."""
    return logits.float().contiguous()


def traits_of(rule: Rule, sharpening: float) -> Traits:
    return Traits(
        *rule.hubs.value,
        rule.replaces,
        rule.ranks_subtrees,
        rule.is_leaf_to_root,
        f32(sharpening),
    )


def arrays(tensors: T) -> T:
    """The same fields as NumPy arrays."""
    return tensors._make(None if field is None else field.numpy() for field in tensors)


def _requests(requests: Requests) -> Requests:
    """As the loops are compiled for them."""
    return arrays(
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
    keep: KeptRows | None = None,
) -> Children:
    """`triton_kernels.child_sampling.sample_children` on the CPU."""
    node_ids = node_ids.int()
    kept, internal = torch.empty(0, 0, 0), node_ids
    if keep is not None and keep.logits.dtype == torch.float32:
        kept, internal = keep
    elif keep is not None:
        keep_rows(keep, logits, requests)
    drawn = Children(
        torch.full((len(logits), max_children), -1, dtype=torch.int64),
        torch.full((len(logits),), -1, dtype=torch.int32),
    )
    _sample_children(
        rows_of(logits).numpy(),
        node_ids.numpy(),
        num_children.int().numpy(),
        _requests(requests),
        traits_of(BUILTIN_RULES[rule], sharpening),
        kept.numpy(),
        internal.numpy(),
        arrays(drawn),
    )
    return drawn


@jit
def _write_tokens(
    # [num_reqs] int64
    idx_mapping,
    first_internal,
    first_child,
    # [num_reqs * num_expanded] int32
    num_children,
    # [num_reqs * num_expanded, ...]
    children,
    # [max_num_reqs, num_internal], written
    sampled,
    # [max_num_reqs, num_nodes], written
    tokens,
):
    row, num_expanded = 0, num_children.shape[0] // max(idx_mapping.shape[0], 1)
    for req in idx_mapping:
        column = first_child
        for i in range(num_expanded):
            sampled[req, first_internal + i] = children.sampled[row]
            for slot in range(num_children[row]):
                tokens[req, column] = children.tokens[row, slot]
                column += 1
            row += 1


def write_tokens(
    state: DraftState,
    level: DraftLevel,
    # [num_reqs] int64
    idx_mapping: torch.Tensor,
    # of [num_reqs * num_expanded] rows, which are kept already
    children: Children,
) -> None:
    """`DraftState.write_tokens` on the CPU."""
    _write_tokens(
        idx_mapping.numpy(),
        level.internal.start,
        level.children.start,
        level.rows(len(idx_mapping)).num_children.numpy(),
        arrays(children),
        state.drafts.sampled.numpy(),
        state.tokens.numpy(),
    )


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
    """`triton_kernels.verification.verify_tree` on the CPU."""
    num_reqs, max_depth = len(target.row_start), len(level_sizes) - 1
    paths = VerifiedPaths(
        torch.full((num_reqs, max_depth + 1), -1, dtype=torch.int64),
        torch.empty(num_reqs, dtype=torch.int32),
        torch.full((num_reqs, max_depth + 1), -1, dtype=torch.int32),
    )
    draft_logits, draft_idx = drafts.logits, requests.req_idx.long()
    if draft_logits.stride(0) == 0:  # all requests share their rows, since none was drawn from
        draft_logits, draft_idx = draft_logits[:1], torch.zeros_like(draft_idx)
    if draft_logits.dtype != torch.float32:  # convert this batch's drafts, not every request's
        draft_logits, draft_idx = draft_logits[draft_idx], torch.arange(num_reqs)
    _verify_trees(
        arrays(
            TargetRows(
                rows_of(target.logits),
                target.temperature,
                target.row_start.int(),
                target.num_nodes.int(),
                target.node_tokens.long(),
            )
        ),
        arrays(drafts._replace(logits=rows_of(draft_logits))),
        draft_idx.numpy(),
        _requests(requests),
        arrays(
            TreeTables(
                torch.atleast_2d(tree.first_child),
                torch.atleast_2d(tree.num_children),
                tree.internal_index,
                torch.atleast_2d(tree.parents),
            )
        ),
        traits_of(BUILTIN_RULES[rule], sharpening),
        arrays(paths),
    )
    return paths
