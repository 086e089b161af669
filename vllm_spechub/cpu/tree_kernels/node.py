# SPDX-License-Identifier: Apache-2.0
"""One node of a tree, compiled by Numba: `triton_kernels.verification.node` for one row."""

import numpy as np

from vllm_spechub.cpu.tree_kernels.vector_math import (
    LOWEST,
    argmax,
    exp_sum,
    f32,
    jit,
    jit_sums,
)
from vllm_spechub.triton_kernels import constants

MAX_CHILDREN = constants.MAX_CHILDREN


@jit
def _ratio(numerator, denominator):
    """min(1, numerator / denominator), and 0 for 0 / 0: what has no mass is not accepted."""
    if numerator >= denominator:
        return f32(1.0) if numerator > f32(0.0) else f32(0.0)
    return numerator / denominator


@jit
def _log_add(first, second):
    """log(exp(first) + exp(second)), where either may be -inf."""
    peak = max(first, second)
    if peak == -np.inf:
        return peak
    return peak + np.log(np.exp(first - peak) + np.exp(second - peak))


@jit_sums
def softmax(
    # [size] finite logits; their softmax on return
    row,
    scale,
    # [size] each
    scratch,
    scratch_bits,
):
    """In place; all on token 0 where every token is masked."""
    peak = row[argmax(row)]
    total = exp_sum(row, peak, scale, scratch, scratch_bits)
    if peak == LOWEST:
        row[1:] = f32(0.0)
        total = f32(1.0)
    for i in range(row.shape[0]):
        row[i] /= total


@jit
def is_sampled(bits, slot):
    return (bits >> slot) & 1 == 1


@jit
def next_slot(
    # -1 before the first
    slot,
    bits,
    num_children,
):
    """The child that is visited after another: samples by slot, then hubs by slot; -1 after the
    last."""
    hubs = slot >= 0 and not is_sampled(bits, slot)
    if not hubs:
        for following in range(slot + 1, num_children):
            if is_sampled(bits, following):
                return following
        slot = -1
    for following in range(slot + 1, num_children):
        if not is_sampled(bits, following):
            return following
    return -1


@jit
def _is_first(
    # [num_children] tokens
    children,
    bits,
    first,
    slot,
):
    """Whether no sample from `first` on, before this one, holds the same token."""
    for other in range(first, slot):
        if is_sampled(bits, other) and children[other] == children[slot]:
            return False
    return True


@jit
def _log_sums(
    # [num_children] tokens
    children,
    bits,
    # log-sum-exp of what is neither a hub nor drawn
    undrawn,
    # [num_children] scaled logits of the children
    logit,
    replaces,
    # [num_children], written
    sums,
):
    """Log-sum-exp of every slot's distribution: what was drawn is added back, the last first."""
    count = children.shape[0]
    total = undrawn
    for slot in range(count - 1, -1, -1):
        if is_sampled(bits, slot) and _is_first(children, bits, 0, slot):
            total = _log_add(total, logit[slot])
        sums[slot] = total
    if replaces:
        sums[:count] = total


@jit_sums
def visit_children(
    # [size] probabilities; on return 0 at the children
    target,
    # [size] finite logits; on return what the residual loses is a multiple of, 0 at the children
    draft,
    scale,
    # [num_children] tokens
    children,
    bits,
    acceptance,
    replaces,
    # [num_children], written
    visit,
    # [size] each
    scratch,
    scratch_bits,
):
    """`node_outcome`: what each child is visited with. Returns what the node is accepted with once
    they have failed, and the weight w for which the residual is `acceptance * target - w * draft`,
    where positive."""
    size, count = target.shape[0], children.shape[0]
    owed, logit = np.empty(MAX_CHILDREN, f32), np.empty(MAX_CHILDREN, f32)
    sums = np.empty(MAX_CHILDREN, f32)
    hub_mass = f32(0.0)
    for slot in range(count):
        owed[slot] = acceptance * target[children[slot]]
        logit[slot] = min(draft[children[slot]] * scale, -LOWEST)
        if not is_sampled(bits, slot):
            hub_mass += owed[slot]
    for slot in range(count):
        target[children[slot]] = f32(0.0)
        draft[children[slot]] = -np.inf
    peak, undrawn = f32(0.0), f32(-np.inf)
    best = argmax(draft)
    if bits == 0 or not draft[best] > LOWEST:
        draft[:] = f32(0.0)
    else:
        peak = draft[best]
        mass = exp_sum(draft, peak, scale, scratch, scratch_bits)
        peak = min(peak * scale, -LOWEST)
        undrawn = peak + np.log(mass)
    _log_sums(children, bits, undrawn, logit, replaces, sums)

    lacking = f32(1.0) - acceptance
    left, kappa, log_sum, weight = f32(1.0), f32(0.0), sums[0], f32(0.0)
    mass = f32(0.0)
    for slot in range(count):
        if not is_sampled(bits, slot):
            continue
        share = max(owed[slot] - kappa * np.exp(logit[slot] - log_sum), f32(0.0))
        if not _is_first(children, bits, 0, slot):  # it failed before
            share = f32(0.0)
        visit[slot] = _ratio(share, left * np.exp(logit[slot] - sums[slot]))
        kappa = left + kappa * np.exp(sums[slot] - log_sum)
        log_sum = sums[slot]
        # where the draft has nothing left, peak and sums need not go together
        weight = kappa * np.exp(peak - log_sum) if undrawn > -np.inf else f32(0.0)
        mass = f32(0.0)
        for i in range(size):
            mass += max(acceptance * target[i] - weight * draft[i], f32(0.0))
        for later in range(slot + 1, count):  # samples that have not been visited
            if is_sampled(bits, later) and _is_first(children, bits, 0, later):
                mass += max(owed[later] - kappa * np.exp(logit[later] - log_sum), f32(0.0))
        left = lacking + hub_mass + mass
    if bits == 0:
        for i in range(size):
            mass += acceptance * target[i]
    unvisited = lacking + mass
    for slot in range(count - 1, -1, -1):
        if not is_sampled(bits, slot):
            unvisited += owed[slot]
            visit[slot] = _ratio(owed[slot], unvisited)
    if mass > f32(0.0):
        return mass / (lacking + mass), weight
    # reached by rounding only, and then with acceptance 1: what is left to emit from is the target
    for slot in range(count):
        if acceptance > f32(0.0):
            target[children[slot]] = owed[slot] / acceptance
    return (f32(1.0) if acceptance >= f32(1.0) else f32(0.0)), f32(0.0)
