# SPDX-License-Identifier: Apache-2.0
"""One node of a tree, compiled by Numba: `triton_kernels.verification.node_rules` for one row."""

import numpy as np

from vllm_spechub.cpu.tree_kernels.vector_math import argmax, exp_row, exp_sum, f32, jit, jit_sums
from vllm_spechub.triton_kernels import constants

LOWEST = f32(constants.LOWEST)


@jit
def _ratio(numerator, denominator):
    """min(1, numerator / denominator), and 0 for 0 / 0: what has no mass is not accepted."""
    if numerator >= denominator:
        return f32(1.0) if numerator > f32(0.0) else f32(0.0)
    return numerator / denominator


@jit_sums
def softmax(
    # [size] logits; their softmax on return
    row,
    scale,
    # [size] each
    scratch,
    scratch_bits,
):
    """In place; returns the peak, LOWEST where every logit is masked."""
    for i in range(row.shape[0]):
        row[i] *= scale
    peak = max(row[argmax(row)], LOWEST)
    for i in range(row.shape[0]):
        row[i] -= peak
    exp_row(row, scratch, scratch_bits)
    total = f32(0.0)
    for i in range(row.shape[0]):
        total += row[i]
    for i in range(row.shape[0]):
        row[i] /= total
    return peak


@jit_sums
def spechub_distribution(
    # [size] the draft's logits; on return what the sampled child is drawn from
    draft,
    temperature,
    sharpening,
    # [num_children] tokens
    children,
    sample_slot,
    # [num_children], written: probability that each hub is the main child
    hub_probs,
    # [size] each
    spare,
    scratch,
    scratch_bits,
):
    """Returns the probabilities that a hub and that the sampled child is the main child."""
    size, count = draft.shape[0], children.shape[0]
    greedy = temperature == f32(0.0)
    scale = f32(1.0) if greedy else f32(1.0) / temperature
    sample = children[sample_slot]
    top = f32(-np.inf)
    for slot in range(count):
        hub_probs[slot] = f32(-np.inf)
        if slot != sample_slot:
            hub_probs[slot] = draft[children[slot]]
            top = max(top, hub_probs[slot])
            draft[children[slot]] = -np.inf
    off_peak = max(draft[argmax(draft)], LOWEST)
    # a row without any possible token was drafted as a greedy one
    greedy = greedy or max(top, off_peak) <= LOWEST
    certain = greedy or off_peak == LOWEST
    off_weight = f32(0.0)
    if certain:
        draft[:] = f32(0.0)
        draft[sample] = f32(1.0)
    else:
        if sharpening != f32(1.0):
            spare[:] = draft
        weight = exp_sum(draft, off_peak, scale * sharpening, scratch, scratch_bits)
        for i in range(size):
            draft[i] /= weight
        off_weight = weight
        if sharpening != f32(1.0):
            off_weight = exp_sum(spare, off_peak, scale, scratch, scratch_bits)

    # the masses on and off the hubs, neither computed as 1 minus the other
    peak = max(top, off_peak)
    hub_mass = f32(0.0)
    for slot in range(count):
        if greedy:
            hub_probs[slot] = f32(1.0) if slot == 0 and sample_slot != 0 else f32(0.0)
        else:
            hub_probs[slot] = np.exp((hub_probs[slot] - peak) * scale)
        hub_mass += hub_probs[slot]
    off_mass = off_weight * np.exp((off_peak - peak) * scale)
    if count == 1:
        off_mass = f32(1.0)
    total = hub_mass + off_mass
    for slot in range(count):
        hub_probs[slot] /= total
    return hub_mass / total, off_mass / total


@jit_sums
def spechub_parts(
    # [size] the masses that the node is to emit
    target,
    # [size] what the sampled child was drawn from
    draft,
    # [num_children] tokens
    children,
    sample_slot,
    ordered,
    # [num_children] and two numbers, of the draft
    hub_probs,
    hub_mass,
    off_mass,
    # [num_children], written: the pool's mass of each hub
    gain,
    # [size], written: the pool's mass off the hubs by token
    residual,
):
    """`_SpecHubParts`; returns what the sampled child, and after it the hub in slot 0, is accepted
    with, and the pool's mass off the hubs."""
    size, count = target.shape[0], children.shape[0]
    sample_target, sample_draft = target[children[sample_slot]], draft[children[sample_slot]]
    for i in range(size):
        residual[i] = max(target[i] - draft[i], f32(0.0))
    for slot in range(count):
        gain[slot] = f32(0.0)
        if slot != sample_slot:
            gain[slot] = target[children[slot]]
            residual[children[slot]] = f32(0.0)
    residual_mass = f32(0.0)
    for i in range(size):
        residual_mass += residual[i]
    if not ordered:
        return _ratio(sample_target, sample_draft), f32(0.0), residual_mass
    # what the target leaves of w to be matched by the hubs, where w is 0
    unclaimed = f32(0.0)
    for i in range(size):
        claimed = max(target[i] - off_mass * draft[i], f32(0.0))
        unclaimed += max(hub_mass * draft[i] - claimed, f32(0.0))
    divisor = hub_mass if hub_mass > f32(0.0) else f32(1.0)
    accept_main = f32(0.0)
    if sample_slot == 0:
        accept_sample = _ratio(sample_target, off_mass * sample_draft)
    else:
        excess = max(sample_target - off_mass * sample_draft, f32(0.0))
        accept_sample = _ratio(excess, hub_mass * sample_draft)
        accept_main = _ratio(gain[0], unclaimed * hub_probs[0] / divisor)
    for slot in range(count):
        gain[slot] = max(gain[slot] - unclaimed * hub_probs[slot] / divisor, f32(0.0))
    return accept_sample, accept_main, residual_mass


@jit
def choose_spechub(
    # [size] the target's probabilities; on rejection what is emitted from, unnormalised
    target,
    # [num_children] tokens
    children,
    sample_slot,
    accept_sample,
    accept_main,
    # [num_children]
    gain,
    residual_mass,
    # [size]
    residual,
    draw,
):
    """`node_outcome` of the SpecHub rules: the accepted slot, the number of children if none."""
    count = children.shape[0]
    possible = target[children[sample_slot]] > f32(0.0)
    failed = f32(1.0) - accept_sample
    pool = failed * (f32(1.0) - accept_main)
    pool_mass = residual_mass
    for slot in range(count):
        pool_mass += gain[slot]
    # reached by rounding only: accept the sampled child, unless the target rules it out
    stuck = not pool_mass > f32(0.0)
    scale = f32(0.0) if stuck else pool / pool_mass
    reject = residual_mass * scale
    if stuck and not possible:
        reject = pool
    accept = np.empty(count, f32)
    total = reject
    for slot in range(count):
        accept[slot] = gain[slot] * scale
        if slot == sample_slot:
            accept[slot] = accept_sample
            if stuck and possible:
                accept[slot] += pool
        elif slot == 0:
            accept[slot] += failed * accept_main
        total += accept[slot]
    threshold = f32(0.0)
    for slot in range(count):
        threshold += accept[slot]
        if draw * total < threshold:
            return slot
    if not stuck:
        target[:] = residual
    return count


@jit
def visit_spechub(
    sample_slot,
    ordered,
    acceptance,
    accept_sample,
    accept_main,
    # [num_children]
    gain,
    residual_mass,
    # [num_children], written: what each child is visited with
    visit,
):
    """`traversal_outcome`; returns what the node is accepted with once its children failed."""
    rest = residual_mass + (f32(1.0) - acceptance)
    left = rest
    for slot in range(gain.shape[0] - 1, -1, -1):
        left += gain[slot]
        visit[slot] = gain[slot] / left if left > f32(0.0) else f32(0.0)
    if ordered:
        visit[0] = accept_main
    visit[sample_slot] = accept_sample
    if residual_mass > f32(0.0):
        return residual_mass / rest
    return f32(1.0) if acceptance == f32(1.0) else f32(0.0)


@jit_sums
def choose_recursive(
    # [size] the target's probabilities; on rejection what is emitted from
    target,
    # [size] the draft's logits, used up
    draft,
    temperature,
    # [num_children] tokens
    children,
    replaced,
    draw,
    # [size] each
    distribution,
    scratch,
    scratch_bits,
):
    """`node_outcome` of recursive rules: the accepted slot, the number of children if none."""
    size, count = target.shape[0], children.shape[0]
    greedy = temperature == f32(0.0)
    scale = f32(1.0) if greedy else f32(1.0) / temperature
    greedy = greedy or draft[argmax(draft)] <= LOWEST
    reach, threshold = f32(1.0), f32(0.0)
    for slot in range(count):
        child = children[slot]
        certain = greedy or draft[argmax(draft)] <= LOWEST
        if certain:
            distribution[:] = f32(0.0)
            distribution[child] = f32(1.0)
        elif slot == 0 or not replaced:
            distribution[:] = draft
            softmax(distribution, scale, scratch, scratch_bits)
        prob = target[child]
        chance = _ratio(prob, distribution[child])
        threshold += reach * chance
        reach *= f32(1.0) - chance
        if draw < threshold:
            return slot
        mass = f32(0.0)
        for i in range(size):
            scratch[i] = max(target[i] - distribution[i], f32(0.0))
            mass += scratch[i]
        if mass > f32(0.0):
            for i in range(size):
                target[i] = scratch[i] / mass
        elif prob > f32(0.0):  # no residual, by rounding only: accept what it does not rule out
            return slot
        if not replaced:
            draft[child] = -np.inf
    return count
