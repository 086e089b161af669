# SPDX-License-Identifier: Apache-2.0
"""`rng.py` as device functions for Triton kernels: equal arguments give equal hash bits."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from . import rng

CHILD = tl.constexpr(rng.CHILD)
ACCEPT = tl.constexpr(rng.ACCEPT)
RESIDUAL = tl.constexpr(rng.RESIDUAL)
DRAW_STRIDE = tl.constexpr(rng.DRAW_STRIDE)

_MIX_FIRST = tl.constexpr(rng.MIX_FIRST)
_MIX_SECOND = tl.constexpr(rng.MIX_SECOND)
_MIX_ADD = tl.constexpr(rng.MIX_ADD)
_FINAL_FIRST = tl.constexpr(rng.FINAL_FIRST)
_FINAL_SECOND = tl.constexpr(rng.FINAL_SECOND)
_BELOW_ONE = tl.constexpr(rng.BELOW_ONE)
# Below this the fast logarithm of 1 - u, whose absolute error is 2e-7, is off by more than 3e-6.
_SERIES_LIMIT = tl.constexpr(2.0**-4)


@triton.jit
def _rotate_left(value, bits: tl.constexpr):
    return (value << bits) | (value >> (32 - bits))


@triton.jit
def _mix(state, word):
    word *= _MIX_FIRST
    word = _rotate_left(word, 15)
    word *= _MIX_SECOND
    return _rotate_left(state ^ word, 13) * 5 + _MIX_ADD


@triton.jit
def _finalize(state):
    state ^= state >> 16
    state *= _FINAL_FIRST
    state ^= state >> 13
    state *= _FINAL_SECOND
    return state ^ (state >> 16)


@triton.jit
def row_key(seed, position, node, purpose: tl.constexpr):
    """`rng.row_key` of scalars: int64 seed and position, and the node's number. Returns uint32."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    state = _mix(low ^ low, low)
    state = _mix(state, ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    state = _mix(state, (position & 0xFFFFFFFF).to(tl.uint32))
    return _finalize(_mix(state, (node * 4 + purpose).to(tl.uint32)))


@triton.jit
def element_hash(key, index):
    """`rng.element_hash` of the elements `index` (int32, not negative). Returns uint32."""
    return _finalize(_mix(key, index.to(tl.uint32)))


@triton.jit
def uniform(bits):
    """`rng.uniform` of uint32 bits."""
    # Halves of the bits convert exactly, even without an instruction for unsigned integers.
    high = (bits >> 16).to(tl.int32).to(tl.float32)
    low = (bits & 0xFFFF).to(tl.int32).to(tl.float32)
    return tl.minimum(high * 2.0**-16 + (low + 0.5) * 2.0**-32, _BELOW_ONE)


if triton.knobs.runtime.interpret:

    @triton.jit
    def fast_log(value):
        """The natural logarithm, for Triton's interpreter, which has no external functions."""
        return tl.log(value)

else:

    @triton.jit
    def fast_log(value):
        """The natural logarithm from the GPU's own base-2 logarithm: 2 instructions, not 20.

        Its absolute error near 1 is 2e-7; elsewhere its relative error is 2e-7.
        """
        return libdevice.fast_logf(value)


@triton.jit
def exponential(bits):
    """`rng.exponential` of uint32 bits, with a relative error of at most 3e-6."""
    u = uniform(bits)
    tail = 0.25 + u * (1.0 / 5.0 + u * (1.0 / 6.0 + u * (1.0 / 7.0)))
    series = u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * tail)))
    return tl.where(u < _SERIES_LIMIT, series, -fast_log(1.0 - u))
