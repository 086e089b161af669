# SPDX-License-Identifier: Apache-2.0
"""Sums of exponentials in one pass over a row, lane by lane, for Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def join(value, peak, total, scale):
    """Add one value to a sum of exponentials that is kept relative to its peak.

    This takes one exponential, whichever of peak and value is larger. The caller then makes the
    larger of the two the peak. Returns the sum relative to it.
    """
    rise = value - peak
    decay = tl.exp(-tl.abs(rise) * scale)
    return tl.where(rise > 0.0, total * decay + 1.0, total + decay)
