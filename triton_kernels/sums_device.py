# SPDX-License-Identifier: Apache-2.0
"""Sums of exponentials in one pass over a row, lane by lane, for Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def join(value, peak, total, scale):
    """A sum of exponentials, relative to its peak, with one value more.

    One exponential, whichever is larger. The peak is the larger of the two from then on.
    """
    rise = value - peak
    decay = tl.exp(-tl.abs(rise) * scale)
    return tl.where(rise > 0.0, total * decay + 1.0, total + decay)
