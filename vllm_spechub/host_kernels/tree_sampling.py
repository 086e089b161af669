# SPDX-License-Identifier: Apache-2.0
"""Child sampling and tree verification, compiled by Numba: the CPU's versions of our own kernels.

They draw the same numbers as the Triton kernels and the PyTorch references, and walk one request
at a time: on rows this small a PyTorch operation costs more than the arithmetic.
"""

import numpy as np
import torch

from vllm_spechub.host_kernels.compiled import (
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
from vllm_spechub.triton_kernels import rng


@jit_sums
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
    ordered,
    # [num_rows, max_children], -1 throughout
    tokens,
    # [num_rows], -1 throughout
    sample_slots,
):
    size = logits.shape[1]
    off_hub, race = np.empty(size, f32), np.empty(size, f32)
    race_bits = race.view(i32)
    scratch, uniforms = np.empty(size, f32), np.empty(size, f32)
    scratch_bits = scratch.view(i32)
    hub_logits = np.empty(4, f32)
    for r in range(logits.shape[0]):
        req = req_idx[r]
        if req < 0:
            continue
        greedy = temperature[req] == f32(0.0)
        scale = f32(1.0) if greedy else f32(1.0) / temperature[req]
        num_hubs = num_children[r] - 1
        for i in range(size):
            off_hub[i] = max(logits[r, i], f32(-3.0e38))
        hubs = tokens[r]
        for rank in range(num_hubs):
            hub = argmax(off_hub)
            hub_logits[rank] = off_hub[hub]
            hubs[rank] = hub
            off_hub[hub] = -np.inf
        if greedy:
            sample = argmax(off_hub)
        else:
            key = row_key(seeds[req], root_positions[r], node_ids[r], rng.CHILD)
            exponential_row(key, race, race_bits, scratch, uniforms)
            log_row(race, race_bits, scratch)
            for i in range(size):
                race[i] = max(off_hub[i] * scale - race[i], f32(-3.0e38))
            for rank in range(num_hubs):
                race[hubs[rank]] = -np.inf
            sample = argmax(race)

        sample_slots[r] = num_hubs
        if ordered and num_hubs > 0:
            main = 0
            if not greedy:
                peak = hub_logits[0]
                for i in range(size):
                    race[i] = (off_hub[i] - peak) * scale
                exp_row(race, scratch, scratch_bits)
                off_hub_weight = f32(0.0)
                for i in range(size):
                    off_hub_weight += race[i]
                total = off_hub_weight
                for rank in range(num_hubs):
                    total += np.exp((hub_logits[rank] - peak) * scale)
                key = row_key(seeds[req], root_positions[r], node_ids[r], rng.LABEL)
                draw = uniform(key) * total
                threshold = f32(0.0)
                main = num_hubs
                for rank in range(num_hubs):
                    threshold += np.exp((hub_logits[rank] - peak) * scale)
                    if draw < threshold:
                        main = rank
                        break
            # hubs move back by one to let the main child in front
            front = sample if main == num_hubs else hubs[main]
            for slot in range(main, 0, -1):
                hubs[slot] = hubs[slot - 1]
            hubs[0] = front
            if main == num_hubs:
                sample_slots[r] = 0
                continue
        hubs[num_hubs] = sample


@jit
def _ratio(numerator, denominator):
    """min(1, numerator / denominator), and 0 for 0 / 0: what has no mass is not accepted."""
    if numerator >= denominator:
        return f32(1.0) if numerator > f32(0.0) else f32(0.0)
    return numerator / denominator


@jit_sums
def _softmax(
    # [size] each
    row,
    scratch,
    scratch_bits,
):
    """softmax in place."""
    peak = max(row[argmax(row)], f32(-3.0e38))
    for i in range(row.shape[0]):
        row[i] -= peak
    exp_row(row, scratch, scratch_bits)
    total = f32(0.0)
    for i in range(row.shape[0]):
        total += row[i]
    for i in range(row.shape[0]):
        row[i] /= total


@jit_sums
def _outcome(
    # [size] the target's probabilities; on return what a rejection emits from, unnormalised
    target,
    # [size] the draft's logits; on return the sampled child's law
    draft,
    temperature,
    # [num_children] tokens
    children,
    sample_slot,
    ordered,
    # [num_children] written: probability of accepting each slot's child
    accept,
    # [size] each
    scratch,
    scratch_bits,
):
    """`draft_law` and `node_outcome` of `triton_kernels.verification.reference`; returns the
    probability of accepting no child."""
    size, count = target.shape[0], children.shape[0]
    greedy = temperature == f32(0.0)
    scale = f32(1.0) if greedy else f32(1.0) / temperature
    sample = children[sample_slot]
    hub_probs = np.zeros(count, f32)
    top = f32(-np.inf)
    for slot in range(count):
        if slot != sample_slot:
            hub_probs[slot] = draft[children[slot]]
            top = max(top, hub_probs[slot])
            draft[children[slot]] = -np.inf
    off_peak = max(draft[argmax(draft)], f32(-3.0e38))
    certain = greedy or off_peak == f32(-3.0e38)
    off_weight = f32(0.0)
    if certain:
        draft[:] = f32(0.0)
        draft[sample] = f32(1.0)
    else:
        for i in range(size):
            draft[i] = (draft[i] - off_peak) * scale
        exp_row(draft, scratch, scratch_bits)
        for i in range(size):
            off_weight += draft[i]
        for i in range(size):
            draft[i] /= off_weight

    # the masses on and off the hubs, neither computed as 1 minus the other
    peak = max(top, off_peak)
    hub_mass = f32(0.0)
    for slot in range(count):
        if slot == sample_slot:
            continue
        if greedy:
            hub_probs[slot] = f32(1.0) if slot == 0 else f32(0.0)
        else:
            hub_probs[slot] = np.exp((hub_probs[slot] - peak) * scale)
        hub_mass += hub_probs[slot]
    off_mass = f32(0.0) if certain else off_weight * np.exp((off_peak - peak) * scale)
    if count == 1:
        off_mass = f32(1.0)
    total = hub_mass + off_mass
    hub_mass /= total
    off_mass /= total
    for slot in range(count):
        hub_probs[slot] /= total

    sample_target, sample_draft = target[sample], draft[sample]
    gain = np.zeros(count, f32)
    for slot in range(count):
        if slot != sample_slot:
            gain[slot] = target[children[slot]]
            target[children[slot]] = f32(0.0)
    accept_main = f32(0.0)
    if ordered:
        # what p leaves of w to be matched by the hubs
        unclaimed = f32(0.0)
        for i in range(size):
            claimed = max(target[i] - off_mass * draft[i], f32(0.0))
            unclaimed += max(hub_mass * draft[i] - claimed, f32(0.0))
        hub_divisor = hub_mass if hub_mass > f32(0.0) else f32(1.0)
        if sample_slot == 0:
            accept_sample = _ratio(sample_target, off_mass * sample_draft)
        else:
            excess = max(sample_target - off_mass * sample_draft, f32(0.0))
            accept_sample = _ratio(excess, hub_mass * sample_draft)
            accept_main = _ratio(gain[0], unclaimed * hub_probs[0] / hub_divisor)
        for slot in range(count):
            gain[slot] = max(gain[slot] - unclaimed * hub_probs[slot] / hub_divisor, f32(0.0))
    else:
        accept_sample = _ratio(sample_target, sample_draft)

    failed = f32(1.0) - accept_sample
    pool = failed * (f32(1.0) - accept_main)
    residual_mass = f32(0.0)
    for i in range(size):
        scratch[i] = max(target[i] - draft[i], f32(0.0))
        residual_mass += scratch[i]
    pool_mass = residual_mass
    for slot in range(count):
        pool_mass += gain[slot]
    stuck = not pool_mass > f32(0.0)
    reject = f32(0.0)
    if stuck:
        # reached by rounding only: accept the sampled child, unless the target rules it out
        accept[:] = f32(0.0)
        if sample_target > f32(0.0):
            accept_sample += pool
        else:
            reject = pool
    else:
        for slot in range(count):
            accept[slot] = gain[slot] * pool / pool_mass
        reject = residual_mass * pool / pool_mass
        target[:] = scratch
    if sample_slot != 0:
        accept[0] += failed * accept_main
    accept[sample_slot] = accept_sample
    return reject


@jit
def _verify_tree(
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
    ordered,
    # [num_reqs, max_depth + 1] each, -1 throughout
    tokens,
    path,
    # [num_reqs]
    num_emitted,
):
    size = target_logits.shape[1]
    target, draft = np.empty(size, f32), np.empty(size, f32)
    scratch, uniforms = np.empty(size, f32), np.empty(size, f32)
    scratch_bits, draft_bits = scratch.view(i32), draft.view(i32)
    accept = np.empty(4, f32)
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
                for i in range(size):
                    target[i] = logits[i] * scale
                _softmax(target, scratch, scratch_bits)
                if not leaf:
                    inner = internal_index[node]
                    draft[:] = draft_logits[draft_idx[r], inner]
                    reject = _outcome(
                        target,
                        draft,
                        draft_temperature[req],
                        children,
                        sample_slots[req, inner],
                        ordered,
                        accept[:count],
                        scratch,
                        scratch_bits,
                    )
                    total = reject
                    for s in range(count):
                        total += accept[s]
                    draw = uniform(row_key(seeds[req], root_positions[r], node, rng.ACCEPT)) * total
                    threshold = f32(0.0)
                    for s in range(count):
                        threshold += accept[s]
                        if draw < threshold:
                            slot = s
                            break
            if leaf or slot == count:
                break
            tokens[r, depth] = children[slot]
            node = first + slot
            depth += 1
            path[r, depth] = node
        if not greedy:
            key = row_key(seeds[req], root_positions[r], node, rng.RESIDUAL)
            exponential_row(key, draft, draft_bits, scratch, uniforms)
            for i in range(size):
                draft[i] = target[i] / draft[i]
            best = argmax(draft)
        tokens[r, depth] = best
        num_emitted[r] = depth + 1


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
        rule == "ordered",
        tokens.numpy(),
        sample_slots.numpy(),
    )
    return tokens, sample_slots


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
    _verify_tree(
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
        rule == "ordered",
        tokens.numpy(),
        path.numpy(),
        num_emitted.numpy(),
    )
    return tokens, num_emitted, path
