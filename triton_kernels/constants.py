# SPDX-License-Identifier: Apache-2.0
"""Numbers that every implementation of the kernels shares."""

MAX_CHILDREN = 4
"""Most children of one node: the kernels unroll over siblings."""
LOWEST = -3.0e38
"""Stands for the logit -inf where -inf means something else, and for the peak of masked rows."""
