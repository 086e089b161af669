# SPDX-License-Identifier: Apache-2.0
"""What Numba needs to turn loops over float32 rows into vector instructions: exp, log and noise.

Numba has no vectorised exp or log of its own; these are expf and logf of the Cephes library without
branches. They work in place on a row, and on the same memory as int32, and are accurate to 1e-7.
"""

import numba
import numpy as np

from vllm_spechub.triton_kernels import constants, rng

f32, i32, u32 = np.float32, np.int32, np.uint32

# The flags nnan and ninf are never set: masked logits are -inf, and unwritten slots hold anything.
_OPTIONS = {"cache": True, "nogil": True, "boundscheck": False, "error_model": "numpy"}
jit = numba.njit(**_OPTIONS, fastmath={"contract"})
# For loops that add up a row: a sum becomes vector instructions only if it may be reordered.
jit_sums = numba.njit(**_OPTIONS, fastmath={"contract", "reassoc"})


LOWEST = f32(constants.LOWEST)


@jit
def finite_row(
    # [size] logits
    source,
    # [size], written
    row,
):
    """`logits.finite`: NaN and -inf as LOWEST, +inf as -LOWEST."""
    for i in range(row.shape[0]):
        # a comparison with NaN fails
        row[i] = min(source[i], -LOWEST) if source[i] > LOWEST else LOWEST


@jit
def exp_row(
    # [size] float32, at most 0
    row,
    # [size] float32 scratch and the same memory as int32
    power,
    power_bits,
):
    """Replace every value by its exponential, and values below -87 by 0."""
    for i in range(row.shape[0]):
        x = row[i] if row[i] > f32(-87.0) else f32(-87.0)
        k = i32(x * f32(1.4426950408889634) - f32(0.5))
        r = x - f32(k) * f32(0.693359375) + f32(k) * f32(2.12194440e-4)
        y = f32(1.9875691500e-4)
        y = y * r + f32(1.3981999507e-3)
        y = y * r + f32(8.3334519073e-3)
        y = y * r + f32(4.1665795894e-2)
        y = y * r + f32(1.6666665459e-1)
        y = y * r + f32(5.0000001201e-1)
        y = y * r * r + r + f32(1.0)
        power_bits[i] = (k + i32(127)) << i32(23)
        row[i] = y if row[i] > f32(-87.0) else f32(0.0)
    for i in range(row.shape[0]):
        row[i] *= power[i]


@jit_sums
def exp_sum(
    # [size] logits
    row,
    peak,
    scale,
    # [size] each
    scratch,
    scratch_bits,
):
    """Replace every value by `exp((value - peak) * scale)`. Returns the sum."""
    for i in range(row.shape[0]):
        row[i] = (row[i] - peak) * scale
    exp_row(row, scratch, scratch_bits)
    total = f32(0.0)
    for i in range(row.shape[0]):
        total += row[i]
    return total


@jit
def log_row(
    # [size] float32, positive and normal
    row,
    # [size] int32, the row's own memory
    row_bits,
    # [size] float32 scratch
    exponent,
):
    """Replace every value by its natural logarithm."""
    for i in range(row.shape[0]):
        bits = row_bits[i]
        exponent[i] = f32((bits >> i32(23)) - i32(127))
        row_bits[i] = (bits & i32(0x7FFFFF)) | i32(0x3F800000)
    for i in range(row.shape[0]):
        m = row[i]
        high = m > f32(1.41421356)
        m = m * f32(0.5) if high else m
        e = exponent[i] + f32(1.0) if high else exponent[i]
        x = m - f32(1.0)
        y = f32(7.0376836292e-2)
        y = y * x + f32(-1.1514610310e-1)
        y = y * x + f32(1.1676998740e-1)
        y = y * x + f32(-1.2420140846e-1)
        y = y * x + f32(1.4249322787e-1)
        y = y * x + f32(-1.6668057665e-1)
        y = y * x + f32(2.0000714765e-1)
        y = y * x + f32(-2.4999993993e-1)
        y = y * x + f32(3.3333331174e-1)
        z = x * x
        y = y * x * z + e * f32(-2.12194440e-4) - f32(0.5) * z
        row[i] = x + y + e * f32(0.693359375)


@jit
def _scramble(word):
    word = u32(word * u32(rng.MIX_FIRST))
    word = u32(word << u32(15)) | u32(word >> u32(17))
    return u32(word * u32(rng.MIX_SECOND))


@jit
def _mix(state, scrambled):
    state = u32(state ^ scrambled)
    state = u32(state << u32(13)) | u32(state >> u32(19))
    return u32(u32(state * u32(5)) + u32(rng.MIX_ADD))


@jit
def _finalize(state):
    state = u32(u32(state ^ u32(state >> u32(16))) * u32(rng.FINAL_FIRST))
    state = u32(u32(state ^ u32(state >> u32(13))) * u32(rng.FINAL_SECOND))
    return u32(state ^ u32(state >> u32(16)))


@jit
def row_key(seed, position, node, purpose):
    """`rng.row_key` of single numbers."""
    state = _mix(u32(0), _scramble(u32(seed & 0xFFFFFFFF)))
    state = _mix(state, _scramble(u32((seed >> 32) & 0xFFFFFFFF)))
    state = _mix(state, _scramble(u32(position & 0xFFFFFFFF)))
    return _finalize(_mix(state, _scramble(u32(node * 4 + purpose))))


@jit
def uniform(bits):
    """`rng.uniform` of one number."""
    high = f32(bits >> u32(16)) * f32(2.0**-16)
    value = high + (f32(bits & u32(0xFFFF)) + f32(0.5)) * f32(2.0**-32)
    return min(value, f32(rng.BELOW_ONE))


@jit
def exponential_row(
    key,
    # number of the first element
    start,
    # [size] float32, written
    row,
    # [size] int32, the row's own memory
    row_bits,
    # [size] float32 scratch each
    exponent,
    uniforms,
):
    """Write `rng.exponential` of the hashes of the elements from `start` on."""
    first = u32(start)
    for i in range(row.shape[0]):
        bits = _finalize(_mix(key, _scramble(u32(first + u32(i)))))
        high = f32(i32(bits >> u32(16))) * f32(2.0**-16)
        u = high + (f32(i32(bits & u32(0xFFFF))) + f32(0.5)) * f32(2.0**-32)
        u = u if u < f32(rng.BELOW_ONE) else f32(rng.BELOW_ONE)
        uniforms[i] = u
        row[i] = f32(1.0) - u
    log_row(row, row_bits, exponent)
    for i in range(row.shape[0]):
        u = uniforms[i]
        series = u * (f32(1.0) + u * (f32(0.5) + u * (f32(1.0 / 3.0) + u * f32(0.25))))
        row[i] = series if u < f32(rng.SERIES_LIMIT) else -row[i]


@jit
def argmax(
    # [size] float32
    row,
):
    """The lowest index of the largest value; NaN and -inf are none, and without any it is 0."""
    top = f32(-np.inf)
    for i in range(row.shape[0]):
        top = row[i] if row[i] > top else top
    if top == f32(-np.inf):
        return 0
    for i in range(row.shape[0]):
        if row[i] == top:
            return i
    return 0
