# SPDX-License-Identifier: Apache-2.0
"""One node of `node_rules` as device functions, which read a node's rows in blocks."""

import triton
import triton.language as tl

from .. import constants
from ..rng_device import element_hash, exponential
from ..sums_device import join

LOWEST = tl.constexpr(constants.LOWEST)
MAX_CHILDREN = tl.constexpr(constants.MAX_CHILDREN)
NO_SLOT = tl.constexpr(constants.MAX_CHILDREN)
# The peak of a point mass on the sampled child: beside it no logit has any weight.
CERTAIN = tl.constexpr(3.0e38)
_NO_INDEX = tl.constexpr(2**31 - 1)


@triton.jit
def _best(value, index):
    """The index of the largest value over lanes, the lowest of a tie."""
    best = tl.max(value, axis=0)
    return tl.min(tl.where(value == best, index, _NO_INDEX), axis=0)


@triton.jit
def _lead(score, index, race, winner):
    """One step of a lane's race: the better score so far and whose it is, the first of a tie."""
    ahead = score > race
    return tl.where(ahead, score, race), tl.where(ahead, index, winner)


@triton.jit
def _accumulate(logit, peak, total, scale):
    """One step of a lane's running maximum and sum of exponentials."""
    return tl.maximum(peak, logit), join(logit, peak, total, scale)


@triton.jit
def _load(
    # [vocab_size]
    logits_ptr,
    index,
    vocab_size,
):
    """Logits as float32, -inf past the end. No other mask: it would cost the vector loads."""
    return tl.load(logits_ptr + index, mask=index < vocab_size, other=float("-inf")).to(tl.float32)


@triton.jit
def ratio(numerator, denominator):
    """min(1, numerator / denominator), and 0 for 0 / 0: what has no mass is not accepted."""
    enough = numerator >= denominator
    quotient = numerator / tl.where(enough, 1.0, denominator)
    return tl.where(enough, tl.where(numerator > 0.0, 1.0, 0.0), quotient)


@triton.jit
def at(vector, index, position):
    """The element of a vector whose index is `position`, 0 if none is."""
    return tl.sum(tl.where(index == position, vector, tl.zeros_like(vector)), axis=0)


@triton.jit
def _drawn_lane(
    # [BLOCK_SIZE]
    lane,
    # [BLOCK_SIZE] unnormalised
    masses,
    key,
):
    """A lane in proportion to its mass; as `rng.draw`, together with `_drawn_place`."""
    return _best(masses / exponential(element_hash(key, lane)), lane)


@triton.jit
def _drawn_place(
    # [LANE_SIZE]
    place,
    # [LANE_SIZE] unnormalised, of the tokens of a lane
    weights,
    key,
    BLOCK_SIZE: tl.constexpr,
):
    return _best(weights / exponential(element_hash(key, BLOCK_SIZE + place)), place)


@triton.jit
def emit(
    # [vocab_size]
    logits_ptr,
    vocab_size,
    key,
    scale,
    greedy,
    BLOCK_SIZE: tl.constexpr,
    LANE_SIZE: tl.constexpr,
):
    """The best token of a row, or a draw from it."""
    lane = tl.arange(0, BLOCK_SIZE)
    token = tl.full([], 0, tl.int32)
    if greedy:
        race = tl.full([BLOCK_SIZE], float("-inf"), tl.float32)
        winner = lane
        for start in range(0, vocab_size, BLOCK_SIZE):
            index = start + lane
            race, winner = _lead(_load(logits_ptr, index, vocab_size), index, race, winner)
        token = _best(race, winner)
    else:
        peaks = tl.full([BLOCK_SIZE], LOWEST, tl.float32)
        masses = tl.zeros([BLOCK_SIZE], tl.float32)
        for start in range(0, vocab_size, BLOCK_SIZE):
            logit = _load(logits_ptr, start + lane, vocab_size)
            peaks, masses = _accumulate(logit, peaks, masses, scale)
        peak = tl.max(peaks, axis=0)
        own_lane = _drawn_lane(lane, masses * tl.exp((peaks - peak) * scale), key)
        place = tl.arange(0, LANE_SIZE)
        logit = _load(logits_ptr, own_lane + place * BLOCK_SIZE, vocab_size)
        # relative to the lane's best, which is far from the row's where all of the lane is unlikely
        weights = tl.exp((logit - at(peaks, lane, own_lane)) * scale)
        token = own_lane + BLOCK_SIZE * _drawn_place(place, weights, key, BLOCK_SIZE)
    return token


@triton.jit
def _is_any(index, tokens):
    return (index == tokens[0]) | (index == tokens[1]) | (index == tokens[2]) | (index == tokens[3])


@triton.jit
def _holds(token, start, size):
    """Whether a token is one of `size` from `start` on."""
    return (token >= start) & (token < start + size)


@triton.jit
def _is_near(tokens, start, size):
    """Whether any of them is. Most blocks hold none, and are spared a comparison per element."""
    near = _holds(tokens[0], start, size) | _holds(tokens[1], start, size)
    return near | _holds(tokens[2], start, size) | _holds(tokens[3], start, size)


@triton.jit
def _with(values, value, position: tl.constexpr):
    """A tuple of four with one of them replaced."""
    if position == 0:
        return (value, values[1], values[2], values[3])
    elif position == 1:
        return (values[0], value, values[2], values[3])
    elif position == 2:
        return (values[0], values[1], value, values[3])
    else:
        return (values[0], values[1], values[2], value)


@triton.jit
def spechub_children(
    # [MAX_CHILDREN]
    children,
    sample_slot,
):
    """A node's hubs as a tuple of four tokens, -1 where there is none, and its sampled child."""
    slots = tl.arange(0, MAX_CHILDREN)
    hub_tokens = tl.where(slots != sample_slot, children, -1)
    hubs = (
        at(hub_tokens, slots, 0),
        at(hub_tokens, slots, 1),
        at(hub_tokens, slots, 2),
        at(hub_tokens, slots, 3),
    )
    return hubs, at(children, slots, sample_slot)


@triton.jit
def sample_scale(draft_temperature, sharpening):
    return sharpening / tl.where(draft_temperature == 0.0, 1.0, draft_temperature)


@triton.jit
def _sample_distribution(peak, total, draft_temperature, sharpening):
    """w as `_sample_prob` takes it, from the draft's peak and sum off the hubs."""
    # Nothing off the hubs, or a greedy draft: the sampled child was certain.
    certain = (draft_temperature == 0.0) | (peak == LOWEST)
    peak = tl.where(certain, CERTAIN, peak)
    return peak, 1.0 / tl.where(certain, 1.0, total), sample_scale(draft_temperature, sharpening)


@triton.jit
def spechub_distribution(
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
    ORDERED: tl.constexpr,
    SHARPENED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """First pass over a node's rows: what `node_rules.draft_distribution` finds, and what makes p
    of the target's.

    Returns p as `_prob` takes it: peak and inverse sum of the target's exponentials, and their
    scale; w as `_sample_prob` takes it; the masses that the label has on the hubs and off them, and
    [MAX_CHILDREN] by hub.
    """
    lane = tl.arange(0, BLOCK_SIZE)
    slots = tl.arange(0, MAX_CHILDREN)
    greedy = draft_temperature == 0.0
    scale = 1.0 / tl.where(greedy, 1.0, draft_temperature)
    is_hub = (children >= 0) & (slots != sample_slot)
    hubs = spechub_children(children, sample_slot)[0]

    target_peaks = tl.full([BLOCK_SIZE], LOWEST, tl.float32)
    draft_peaks = target_peaks
    target_total = tl.zeros([BLOCK_SIZE], tl.float32)
    draft_total = target_total
    label_total = target_total
    for start in range(0, vocab_size, BLOCK_SIZE):
        index = start + lane
        logit = _load(target_ptr, index, vocab_size)
        target_peaks, target_total = _accumulate(logit, target_peaks, target_total, target_scale)
        logit = _load(draft_ptr, index, vocab_size)
        if _is_near(hubs, start, BLOCK_SIZE):
            logit = tl.where(_is_any(index, hubs), float("-inf"), logit)
        if ORDERED and SHARPENED:
            _, label_total = _accumulate(logit, draft_peaks, label_total, scale)
        draft_peaks, draft_total = _accumulate(logit, draft_peaks, draft_total, scale * sharpening)
    target_peak = tl.max(target_peaks, axis=0)
    target_total *= tl.exp((target_peaks - target_peak) * target_scale)
    target_sum = tl.sum(target_total, axis=0)
    draft_peak = tl.max(draft_peaks, axis=0)
    draft_total *= tl.exp((draft_peaks - draft_peak) * scale * sharpening)
    draft_sum = tl.sum(draft_total, axis=0)

    # The label's masses on and off the hubs, neither computed as 1 minus the other.
    hub_mass = 0.0
    off_hub_mass = 1.0
    hub_probs = tl.zeros([MAX_CHILDREN], tl.float32)
    if ORDERED:
        label_sum = draft_sum
        if SHARPENED:
            label_total *= tl.exp((draft_peaks - draft_peak) * scale)
            label_sum = tl.sum(label_total, axis=0)
        hub_logits = tl.load(draft_ptr + children, mask=is_hub, other=float("-inf"))
        hub_logits = hub_logits.to(tl.float32)
        peak = tl.maximum(tl.max(hub_logits, axis=0), draft_peak)
        # A row without any possible token was drafted as a greedy one.
        greedy = greedy | (peak == LOWEST)
        hub_probs = tl.exp((hub_logits - peak) * scale)
        nothing = greedy | (draft_peak == LOWEST)
        off_hub_mass = tl.where(nothing, 0.0, label_sum * tl.exp((draft_peak - peak) * scale))
        # A greedy draft's distribution is a point mass on the first child.
        hub_probs = tl.where(greedy, tl.where((slots == 0) & is_hub, 1.0, 0.0), hub_probs)
        # Without hubs all the mass is off them.
        off_hub_mass = tl.where(tl.sum(is_hub.to(tl.int32), axis=0) == 0, 1.0, off_hub_mass)
        hub_mass = tl.sum(hub_probs, axis=0)
        mass = hub_mass + off_hub_mass
        hub_probs /= mass
        hub_mass /= mass
        off_hub_mass /= mass
    p = (target_peak, 1.0 / target_sum, target_scale)
    w = _sample_distribution(draft_peak, draft_sum, draft_temperature, sharpening)
    return p, w, (hub_mass, off_hub_mass), hub_probs


@triton.jit
def _prob(logit, p):
    peak, inverse_sum, scale = p
    return tl.exp((logit - peak) * scale) * inverse_sum


@triton.jit
def _sample_prob(logit, is_sample, w):
    prob = _prob(logit, w)
    return tl.where(is_sample, tl.where(w[0] == CERTAIN, 1.0, prob), prob)


@triton.jit
def _spechub_masses(
    # [vocab_size]
    target_ptr,
    # [vocab_size]
    draft_ptr,
    index,
    hubs,
    sample,
    p,
    w,
    acceptance,
    vocab_size,
    near,
):
    """T = acceptance * p and w at some tokens, both 0 on the hubs; `near` says whether the node's
    children may be among them."""
    target = _prob(_load(target_ptr, index, vocab_size), (p[0], acceptance * p[1], p[2]))
    draft = _prob(_load(draft_ptr, index, vocab_size), w)
    if near:
        is_hub = _is_any(index, hubs)
        draft = tl.where(index == sample, tl.where(w[0] == CERTAIN, 1.0, draft), draft)
        target = tl.where(is_hub, 0.0, target)
        draft = tl.where(is_hub, 0.0, draft)
    return target, draft


@triton.jit
def _block_masses(
    # [vocab_size]
    target_ptr,
    # [vocab_size]
    draft_ptr,
    start,
    hubs,
    sample,
    p,
    w,
    acceptance,
    vocab_size,
    BLOCK_SIZE: tl.constexpr,
):
    near = _is_near(hubs, start, BLOCK_SIZE) | _holds(sample, start, BLOCK_SIZE)
    index = start + tl.arange(0, BLOCK_SIZE)
    return _spechub_masses(
        target_ptr, draft_ptr, index, hubs, sample, p, w, acceptance, vocab_size, near
    )


@triton.jit
def spechub_parts(
    # [vocab_size]
    target_ptr,
    # [vocab_size]
    draft_ptr,
    # [MAX_CHILDREN]
    children,
    sample_slot,
    distribution,
    acceptance,
    ordered,
    vocab_size,
    ORDERED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Second pass over a node's rows: `node_rules._SpecHubParts` of T = acceptance * p, with
    `ordered` as a scalar where ORDERED allows it. The residual's mass is returned by lane."""
    p, w, masses, hub_probs = distribution
    hub_mass, off_hub_mass = masses
    hubs, sample = spechub_children(children, sample_slot)
    slots = tl.arange(0, MAX_CHILDREN)
    residual_mass = tl.zeros([BLOCK_SIZE], tl.float32)
    unclaimed = residual_mass
    for start in range(0, vocab_size, BLOCK_SIZE):
        target, draft = _block_masses(
            target_ptr, draft_ptr, start, hubs, sample, p, w, acceptance, vocab_size, BLOCK_SIZE
        )
        residual_mass += tl.maximum(target - draft, 0.0)
        if ORDERED:
            claimed = tl.maximum(target - off_hub_mass * draft, 0.0)
            unclaimed += tl.maximum(hub_mass * draft - claimed, 0.0)

    is_hub = (children >= 0) & (slots != sample_slot)
    logit = tl.load(target_ptr + children, mask=is_hub, other=float("-inf")).to(tl.float32)
    hub_target = acceptance * _prob(logit, p)
    sample_target = acceptance * _prob(tl.load(target_ptr + sample).to(tl.float32), p)
    sample_draft = _sample_prob(tl.load(draft_ptr + sample).to(tl.float32), True, w)
    accept_sample = ratio(sample_target, sample_draft)
    accept_main = 0.0
    hub_gain = hub_target
    if ORDERED:
        # Share of each hub in what the target leaves unclaimed: l_h.
        share = tl.sum(unclaimed, axis=0) * hub_probs / tl.where(hub_mass == 0.0, 1.0, hub_mass)
        as_main = off_hub_mass * sample_draft
        excess = tl.maximum(sample_target - as_main, 0.0)
        accept_ordered = tl.where(
            sample_slot == 0,
            ratio(sample_target, as_main),
            ratio(excess, hub_mass * sample_draft),
        )
        accept_sample = tl.where(ordered, accept_ordered, accept_sample)
        accept_main = tl.where(ordered, at(ratio(hub_target, share), slots, 0), 0.0)
        hub_gain = tl.where(ordered, tl.maximum(hub_target - share, 0.0), hub_target)
    return accept_sample, accept_main, hub_gain, residual_mass, sample_target


@triton.jit
def residual_lanes(
    # [vocab_size]
    target_ptr,
    # [vocab_size]
    draft_ptr,
    # [MAX_CHILDREN]
    children,
    sample_slot,
    p,
    w,
    acceptance,
    vocab_size,
    BLOCK_SIZE: tl.constexpr,
):
    """The mass of (acceptance * p - w)+ off the hubs in every lane, [BLOCK_SIZE]."""
    hubs, sample = spechub_children(children, sample_slot)
    masses = tl.zeros([BLOCK_SIZE], tl.float32)
    for start in range(0, vocab_size, BLOCK_SIZE):
        target, draft = _block_masses(
            target_ptr, draft_ptr, start, hubs, sample, p, w, acceptance, vocab_size, BLOCK_SIZE
        )
        masses += tl.maximum(target - draft, 0.0)
    return masses


@triton.jit
def emit_residual(
    # [vocab_size]
    target_ptr,
    # [vocab_size]
    draft_ptr,
    # [MAX_CHILDREN]
    children,
    sample_slot,
    p,
    w,
    acceptance,
    # [BLOCK_SIZE], as `residual_lanes` gives them
    masses,
    vocab_size,
    key,
    BLOCK_SIZE: tl.constexpr,
    LANE_SIZE: tl.constexpr,
):
    """A draw from (acceptance * p - w)+ off the hubs; from p where that has no mass."""
    token = tl.full([], 0, tl.int32)
    if tl.max(masses, axis=0) > 0.0:
        hubs, sample = spechub_children(children, sample_slot)
        own_lane = _drawn_lane(tl.arange(0, BLOCK_SIZE), masses, key)
        place = tl.arange(0, LANE_SIZE)
        index = own_lane + place * BLOCK_SIZE
        target, draft = _spechub_masses(
            target_ptr, draft_ptr, index, hubs, sample, p, w, acceptance, vocab_size, True
        )
        weights = tl.maximum(target - draft, 0.0)
        token = own_lane + BLOCK_SIZE * _drawn_place(place, weights, key, BLOCK_SIZE)
    else:
        token = emit(target_ptr, vocab_size, key, p[2], False, BLOCK_SIZE, LANE_SIZE)
    return token


@triton.jit
def _slot_prob(logit, is_child, peak, total, scale, greedy):
    """A slot's distribution: a point mass on its child where drafting had no choice."""
    certain = greedy | (peak == LOWEST)
    prob = tl.exp((logit - peak) * scale) / tl.where(certain, 1.0, total)
    return tl.where(certain, tl.where(is_child, 1.0, 0.0), prob)


@triton.jit
def _residual_after(
    prob, logit, index, tokens, distributions, masses, COUNT: tl.constexpr, REPLACED: tl.constexpr
):
    """What recursive rejection of the first COUNT slots leaves of a target probability.

    `masses` holds the mass that each slot's residual had; a slot that was not tried, or whose
    residual had none, holds 0 and leaves all as it was.
    """
    scale, greedy, peaks, totals = distributions
    for slot in tl.static_range(COUNT):
        is_child = index == tokens[slot]
        draft = _slot_prob(logit, is_child, peaks[slot], totals[slot], scale, greedy)
        used = masses[slot] > 0.0
        left = tl.maximum(prob - draft, 0.0) / tl.where(used, masses[slot], 1.0)
        prob = tl.where(used, left, prob)
        if not REPLACED:
            logit = tl.where(is_child, float("-inf"), logit)
    return prob


@triton.jit
def _recursive_lanes(
    # [vocab_size]
    target_ptr,
    # [vocab_size]
    draft_ptr,
    p,
    tokens,
    distributions,
    masses,
    vocab_size,
    COUNT: tl.constexpr,
    REPLACED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """What recursive rejection of the first COUNT slots leaves in every lane, [BLOCK_SIZE]."""
    lane = tl.arange(0, BLOCK_SIZE)
    mass = tl.zeros([BLOCK_SIZE], tl.float32)
    for start in range(0, vocab_size, BLOCK_SIZE):
        index = start + lane
        prob = _prob(_load(target_ptr, index, vocab_size), p)
        draft = _load(draft_ptr, index, vocab_size)
        mass += _residual_after(prob, draft, index, tokens, distributions, masses, COUNT, REPLACED)
    return mass


@triton.jit
def _emit_recursive(
    # [vocab_size]
    target_ptr,
    # [vocab_size]
    draft_ptr,
    p,
    tokens,
    distributions,
    masses,
    vocab_size,
    key,
    REPLACED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LANE_SIZE: tl.constexpr,
):
    """A draw from what recursive rejection of all slots leaves."""
    lanes = _recursive_lanes(
        target_ptr,
        draft_ptr,
        p,
        tokens,
        distributions,
        masses,
        vocab_size,
        MAX_CHILDREN,
        REPLACED,
        BLOCK_SIZE,
    )
    own_lane = _drawn_lane(tl.arange(0, BLOCK_SIZE), lanes, key)
    place = tl.arange(0, LANE_SIZE)
    index = own_lane + place * BLOCK_SIZE
    prob = _prob(_load(target_ptr, index, vocab_size), p)
    draft = _load(draft_ptr, index, vocab_size)
    weights = _residual_after(
        prob, draft, index, tokens, distributions, masses, MAX_CHILDREN, REPLACED
    )
    return own_lane + BLOCK_SIZE * _drawn_place(place, weights, key, BLOCK_SIZE)


@triton.jit
def verify_recursive(
    # [vocab_size]
    target_ptr,
    # [vocab_size]
    draft_ptr,
    # [MAX_CHILDREN]
    children,
    target_scale,
    draft_temperature,
    vocab_size,
    draw,
    residual_key,
    REPLACED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LANE_SIZE: tl.constexpr,
):
    """The accepted slot, or NO_SLOT, and the token to emit in that case, where all children were
    drawn from the draft: independently if REPLACED, else without replacement. Source:
    `node_rules._recursive_distribution` and `node_rules._recursive_outcome`.

    A pass for the distributions, one for each child rejected, and one to draw when all were.
    """
    lane = tl.arange(0, BLOCK_SIZE)
    slots = tl.arange(0, MAX_CHILDREN)
    greedy = draft_temperature == 0.0
    scale = 1.0 / tl.where(greedy, 1.0, draft_temperature)
    tokens = (
        at(children, slots, 0),
        at(children, slots, 1),
        at(children, slots, 2),
        at(children, slots, 3),
    )

    # Peaks and sums, of the target and of what the draft has besides the children.
    target_peaks = tl.full([BLOCK_SIZE], LOWEST, tl.float32)
    draft_peaks = target_peaks
    target_total = tl.zeros([BLOCK_SIZE], tl.float32)
    draft_total = target_total
    for start in range(0, vocab_size, BLOCK_SIZE):
        index = start + lane
        logit = _load(target_ptr, index, vocab_size)
        target_peaks, target_total = _accumulate(logit, target_peaks, target_total, target_scale)
        logit = _load(draft_ptr, index, vocab_size)
        if not REPLACED:  # noqa: SIM102
            if _is_near(tokens, start, BLOCK_SIZE):
                logit = tl.where(_is_any(index, tokens), float("-inf"), logit)
        draft_peaks, draft_total = _accumulate(logit, draft_peaks, draft_total, scale)
    target_peak = tl.max(target_peaks, axis=0)
    target_total *= tl.exp((target_peaks - target_peak) * target_scale)
    p = (target_peak, 1.0 / tl.sum(target_total, axis=0), target_scale)
    peak3 = tl.max(draft_peaks, axis=0)
    total3 = tl.sum(draft_total * tl.exp((draft_peaks - peak3) * scale), axis=0)
    peak0, peak1, peak2 = peak3, peak3, peak3
    total0, total1, total2 = total3, total3, total3
    logits = tl.load(draft_ptr + children, mask=children >= 0, other=float("-inf")).to(tl.float32)
    if not REPLACED:
        # A slot is drawn from its own child, those after it and the rest: added up from the last.
        peak3, total3 = _accumulate(at(logits, slots, 3), peak3, total3, scale)
        peak2, total2 = _accumulate(at(logits, slots, 2), peak3, total3, scale)
        peak1, total1 = _accumulate(at(logits, slots, 1), peak2, total2, scale)
        peak0, total0 = _accumulate(at(logits, slots, 0), peak1, total1, scale)
    # A row without any possible token was drafted as a greedy one.
    distributions = (
        scale,
        greedy | (peak0 == LOWEST),
        (peak0, peak1, peak2, peak3),
        (total0, total1, total2, total3),
    )

    target_logits = tl.load(target_ptr + children, mask=children >= 0, other=float("-inf"))
    probs = _prob(target_logits.to(tl.float32), p)
    slot = tl.full([], NO_SLOT, tl.int32)
    reach = tl.full([], 1.0, tl.float32)
    threshold = tl.full([], 0.0, tl.float32)
    masses = (0.0, 0.0, 0.0, 0.0)
    for tried in tl.static_range(MAX_CHILDREN):
        token = tokens[tried]
        mass = tl.full([], 0.0, tl.float32)
        if (slot == NO_SLOT) & (token >= 0):
            logit = at(logits, slots, tried)
            prob = at(probs, slots, tried)
            prob = _residual_after(
                prob, logit, token, tokens, distributions, masses, tried, REPLACED
            )
            peak, total = distributions[2][tried], distributions[3][tried]
            chance = ratio(prob, _slot_prob(logit, True, peak, total, scale, distributions[1]))
            threshold += reach * chance
            reach *= 1.0 - chance
            if draw < threshold:
                slot = tried + tl.zeros_like(slot)
            else:
                lanes = _recursive_lanes(
                    target_ptr,
                    draft_ptr,
                    p,
                    tokens,
                    distributions,
                    _with(masses, 1.0, tried),
                    vocab_size,
                    tried + 1,
                    REPLACED,
                    BLOCK_SIZE,
                )
                mass = tl.sum(lanes, axis=0)
                # A residual without mass is reached by rounding only: accept the child, unless the
                # residual rules it out.
                if (mass <= 0.0) & (prob > 0.0):
                    slot = tried + tl.zeros_like(slot)
        masses = _with(masses, mass, tried)
    emitted = tl.full([], -1, tl.int32)
    if slot == NO_SLOT:
        emitted = _emit_recursive(
            target_ptr,
            draft_ptr,
            p,
            tokens,
            distributions,
            masses,
            vocab_size,
            residual_key,
            REPLACED,
            BLOCK_SIZE,
            LANE_SIZE,
        )
    return slot, emitted
