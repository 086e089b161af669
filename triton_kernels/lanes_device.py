# SPDX-License-Identifier: Apache-2.0
"""Rows of logits by lanes, for Triton kernels: token i is in lane i % LANES, at place i // LANES.

One pass over a row leaves a peak and a sum of exponentials in every lane. That is enough to find
the best token, to draw one as `rng.draw` does, and to take some tokens out: only their lanes are
read again, a few tokens each.
"""

import triton
import triton.language as tl

from . import constants
from .rng_device import element_hash, exponential

# Stands for the logit -inf of masked tokens, which rank above the tokens that are not there.
LOWEST = tl.constexpr(constants.LOWEST)
HIGHEST = tl.constexpr(-constants.LOWEST)
ABSENT = tl.constexpr(-3.4e38)
MAX_CHILDREN = tl.constexpr(constants.MAX_CHILDREN)
_NO_INDEX = tl.constexpr(2**31 - 1)


@triton.jit
def at(vector, index, position):
    """The element of a vector whose index is `position`, 0 if none is."""
    return tl.sum(tl.where(index == position, vector, tl.zeros_like(vector)), axis=0)


@triton.jit
def first_best(value, index):
    """The lowest index of the largest value; of no value if all are NaN, then 0."""
    best = tl.max(value, axis=0)
    found = tl.min(tl.where(value == best, index, _NO_INDEX), axis=0)
    return tl.where(found == _NO_INDEX, 0, found)


@triton.jit
def load_logits(
    # [vocab_size]
    row_ptr,
    index,
    vocab_size,
):
    """Finite float32: NaN and -inf as LOWEST, +inf as HIGHEST, ABSENT past the end."""
    value = tl.load(row_ptr + index, mask=index < vocab_size, other=ABSENT).to(tl.float32)
    # a comparison with NaN fails
    value = tl.where(value > LOWEST, tl.minimum(value, HIGHEST), LOWEST)
    return tl.where(index < vocab_size, value, ABSENT)


@triton.jit
def join(value, peak, total, scale):
    """A sum of exponentials, relative to its peak, with one value more.

    One exponential, whichever is larger. The peak is the larger of the two from then on.
    """
    rise = value - peak
    decay = tl.exp(-tl.abs(rise) * scale)
    return tl.where(rise > 0.0, total * decay + 1.0, total + decay)


@triton.jit
def lane_index(lane, PLACES: tl.constexpr, LANES: tl.constexpr):
    """[PLACES]: a lane's tokens."""
    return lane + tl.arange(0, PLACES) * LANES


@triton.jit
def is_any(
    # [PLACES]
    index,
    # [MAX_CHILDREN], -1 where there is none
    tokens,
):
    """[PLACES] bool: whether a token is one of some."""
    return tl.max((index[:, None] == tokens[None, :]).to(tl.int32), axis=1) > 0


@triton.jit
def lane_logits(
    # [vocab_size]
    row_ptr,
    lane,
    # [MAX_CHILDREN]
    taken,
    vocab_size,
    PLACES: tl.constexpr,
    LANES: tl.constexpr,
):
    """[PLACES]: those of a lane, ABSENT for tokens that are taken out."""
    index = lane_index(lane, PLACES, LANES)
    return tl.where(is_any(index, taken), ABSENT, load_logits(row_ptr, index, vocab_size))


@triton.jit
def lane_sums(
    # [vocab_size]
    row_ptr,
    scale,
    vocab_size,
    LANES: tl.constexpr,
):
    """Every lane's peak, and its sum of exponentials relative to that. [LANES] each"""
    lane = tl.arange(0, LANES)
    peaks = tl.full([LANES], ABSENT, tl.float32)
    sums = tl.zeros([LANES], tl.float32)
    for start in range(0, vocab_size, LANES):
        value = load_logits(row_ptr, start + lane, vocab_size)
        sums = join(value, peaks, sums, scale)
        peaks = tl.maximum(peaks, value)
    return peaks, sums


@triton.jit
def without(
    # [vocab_size]
    row_ptr,
    # [LANES]
    peaks,
    # [LANES]
    sums,
    token,
    # [MAX_CHILDREN], the token among them
    taken,
    scale,
    vocab_size,
    PLACES: tl.constexpr,
    LANES: tl.constexpr,
):
    """`lane_sums` of the lane of one token again, without the tokens that are taken out."""
    lane = tl.arange(0, LANES)
    value = lane_logits(row_ptr, token % LANES, taken, vocab_size, PLACES, LANES)
    peak = tl.max(value, axis=0)
    total = tl.sum(tl.exp((value - peak) * scale), axis=0)
    own = lane == token % LANES
    return tl.where(own, peak, peaks), tl.where(own, total, sums)


@triton.jit
def total_weight(
    # [LANES]
    peaks,
    # [LANES]
    sums,
    peak,
    scale,
):
    """What exponentials relative to a peak add up to."""
    return tl.sum(sums * tl.exp((peaks - peak) * scale), axis=0)


@triton.jit
def draw_lane(
    # [LANES] unnormalised
    weights,
    key,
    first,
    LANES: tl.constexpr,
):
    """A lane in proportion to its weight; as `rng.draw`, together with `draw_place`."""
    lane = tl.arange(0, LANES)
    return first_best(weights / exponential(element_hash(key, first + lane)), lane)


@triton.jit
def draw_place(
    # [PLACES] unnormalised, of the tokens of a lane
    weights,
    key,
    first,
    PLACES: tl.constexpr,
    LANES: tl.constexpr,
):
    """A place in proportion to its weight, 0 where there is but one."""
    place = tl.arange(0, PLACES)
    noise = exponential(element_hash(key, first + LANES + place))
    return first_best(weights / noise, place)
