# SPDX-License-Identifier: Apache-2.0
"""Rows of logits by lanes, for Triton kernels: token i is in lane i % LANES, at place i // LANES.

A row is split over SPLITS programs, each of which owns LANES // SPLITS neighbouring lanes. So every
lane's sum is made by one program, in the order of its places, and splits are added up in their
order, whatever else the batch holds: all ranks and all batches find the same.

One pass over a row leaves a peak and a sum of powers of 2 in every lane. That is enough to find
the best token, to draw one as `rng.draw` does, and to take some tokens out: only their lanes are
read again, a few tokens each. Scales are inverse temperatures, times `LOG2_E`.
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
LOG2_E = tl.constexpr(1.4426950408889634)
_NO_INDEX = tl.constexpr(2**31 - 1)

SPLITS = 16
"""Programs that share a row."""
# A program's tile is REPEATS times ROWS places of its lanes: with 128 lanes of 2-byte logits each
# thread of a warp loads REPEATS times 128 bits at once.
REPEATS = tl.constexpr(8)
ROWS = tl.constexpr(2)
STEP = tl.constexpr(8 * 2)
PASS_WARPS = 1
"""Warps of a program that passes over its part of a row."""
STAGES = tl.constexpr(3)


if triton.knobs.runtime.interpret:

    @triton.jit
    def weight_of(exponent):
        """2 ** exponent, at most 1, and 0 for NaN; for Triton's interpreter, which has no PTX."""
        power = tl.exp2(tl.where(exponent < 0.0, exponent, 0.0))
        return tl.where(exponent == exponent, power, 0.0)

    @triton.jit
    def larger(value, other):
        """The larger of two, where `other` may be NaN."""
        return tl.where(other > value, other, value)

else:

    @triton.jit
    def weight_of(exponent):
        """2 ** exponent, at most 1, and 0 for NaN: 2 instructions."""
        return tl.inline_asm_elementwise(
            "{ .reg .f32 p; ex2.approx.ftz.f32 p, $1; add.sat.f32 $0, p, 0f00000000; }",
            "=f,f",
            [exponent],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def larger(value, other):
        """The larger of two, where `other` may be NaN: 1 instruction."""
        return tl.maximum(value, other)


@triton.jit
def limit(scale):
    """What stands for the logit +inf: it may be multiplied by a scale."""
    return HIGHEST / tl.maximum(scale, 1.0)


@triton.jit
def power(value, peak, scale):
    """2 ** ((value - peak) * scale), at most 1, and 0 for NaN; the peak is `limit` at most. What
    rounds the peak times the scale is common to all values."""
    return weight_of(tl.fma(value, scale, -peak * scale))


@triton.jit
def rescaled(peak, higher, scale):
    """What sums that are relative to a peak are multiplied by to be relative to a higher one."""
    return weight_of(peak * scale - higher * scale)


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
def tile_tokens(first_lane, place, OWN: tl.constexpr, LANES: tl.constexpr):
    """The tokens of OWN lanes at the STEP places from one on. [ROWS, REPEATS, OWN]"""
    rows, repeats = tl.arange(0, ROWS)[:, None, None], tl.arange(0, REPEATS)[None, :, None]
    places = place + repeats * ROWS + rows
    return places * LANES + (first_lane + tl.arange(0, OWN))[None, None, :]


@triton.jit
def load_tile(
    # [vocab_size]
    row_ptr,
    first_lane,
    place,
    vocab_size,
    MASKED: tl.constexpr,
    OWN: tl.constexpr,
    LANES: tl.constexpr,
):
    """Logits as they are, NaN and +inf included, in float32; -inf past the end, which only a
    MASKED tile may reach. [ROWS, REPEATS, OWN]"""
    index = tile_tokens(first_lane, place, OWN, LANES)
    if MASKED:
        value = tl.load(row_ptr + index, mask=index < vocab_size, other=float("-inf"))
    else:
        value = tl.load(row_ptr + index)
    return value.to(tl.float32)


@triton.jit
def whole_steps(vocab_size, LANES: tl.constexpr):
    """The place where the last step begins, which is not whole, unless it is empty."""
    return vocab_size // (LANES * STEP) * STEP


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
def owns(first_lane, token, OWN: tl.constexpr, LANES: tl.constexpr):
    """Whether a token is in one of OWN lanes; -1 is in none."""
    lane = token % LANES
    return (token >= 0) & (lane >= first_lane) & (lane < first_lane + OWN)


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
def _add_step(
    # [ROWS, OWN] each
    peaks,
    sums,
    # [vocab_size]
    row_ptr,
    first_lane,
    place,
    scale,
    highest,
    vocab_size,
    MASKED: tl.constexpr,
    OWN: tl.constexpr,
    LANES: tl.constexpr,
):
    value = load_tile(row_ptr, first_lane, place, vocab_size, MASKED, OWN, LANES)
    higher = tl.minimum(larger(peaks, tl.max(value, axis=1)), highest)
    sums *= rescaled(peaks, higher, scale)
    sums += tl.sum(power(value, higher[:, None, :], scale), axis=1)
    return higher, sums


@triton.jit
def lane_sums(
    # [vocab_size]
    row_ptr,
    first_lane,
    scale,
    highest,
    vocab_size,
    OWN: tl.constexpr,
    LANES: tl.constexpr,
):
    """Each of OWN lanes' peak, from LOWEST, where no token is possible, to the highest; and what
    its powers of 2 relative to the peak add up to. [OWN] each"""
    peaks = tl.full([ROWS, OWN], LOWEST, tl.float32)
    sums = tl.zeros([ROWS, OWN], tl.float32)
    whole = whole_steps(vocab_size, LANES)
    for place in tl.range(0, whole, STEP, num_stages=STAGES):
        peaks, sums = _add_step(
            peaks, sums, row_ptr, first_lane, place, scale, highest, vocab_size, False, OWN, LANES
        )
    if whole * LANES < vocab_size:
        peaks, sums = _add_step(
            peaks, sums, row_ptr, first_lane, whole, scale, highest, vocab_size, True, OWN, LANES
        )
    peak = tl.max(peaks, axis=0)
    return peak, tl.sum(sums * rescaled(peaks, peak[None, :], scale), axis=0)


@triton.jit
def without(
    # [vocab_size]
    row_ptr,
    # [n] each
    peaks,
    sums,
    lane,
    token,
    # [MAX_CHILDREN], the token among them
    taken,
    scale,
    highest,
    vocab_size,
    PLACES: tl.constexpr,
    LANES: tl.constexpr,
):
    """`lane_sums` of the lane of one token again, without the tokens that are taken out; ABSENT is
    the peak of a lane without any more. `lane` says which lanes the sums are those of."""
    value = lane_logits(row_ptr, token % LANES, taken, vocab_size, PLACES, LANES)
    peak = tl.minimum(tl.max(value, axis=0), highest)
    total = tl.sum(power(value, peak, scale), axis=0)
    own = lane == token % LANES
    return tl.where(own, peak, peaks), tl.where(own, total, sums)


@triton.jit
def total_weight(
    # [n]
    peaks,
    # [n]
    sums,
    peak,
    scale,
):
    """What powers of 2 relative to a peak add up to."""
    return tl.sum(sums * rescaled(peaks, peak, scale), axis=0)


@triton.jit
def draw_lane(
    # [n] unnormalised
    weights,
    # [n]
    lane,
    key,
    first,
):
    """A lane in proportion to its weight, and the number that it won with, the larger the better;
    as `rng.draw`, together with `draw_place`."""
    score = weights / exponential(element_hash(key, first + lane))
    return first_best(score, lane), tl.max(score, axis=0)


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
