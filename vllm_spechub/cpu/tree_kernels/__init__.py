# SPDX-License-Identifier: Apache-2.0
"""Our own kernels, compiled by Numba: the CPU's versions of `triton_kernels`."""
