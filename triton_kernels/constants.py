# SPDX-License-Identifier: Apache-2.0
"""Numbers that every implementation of the kernels shares."""

MAX_CHILDREN = 4
"""Most children of one node: the kernels unroll over siblings."""
LOWEST = -3.0e38
"""Stands for the logit -inf where -inf means something else, and for the peak of masked rows."""
CONFIDENT = 0.2
"""A token that the draft gives more than this is a hub of `mixed`, at least one and at most k -
1."""
SAMPLE_SHARES = (1.0, 0.11, 0.05, 0.03)
FIRST_SAMPLE_LOSS = 0.45
"""The expected acceptance of samples, from z, the draft's mass off the hubs: z (1 - 0.45 z) for the
first, then 0.11, 0.05 and 0.03 of z. Fitted to two pairs of models; any other estimate is as
lossless."""
LONE_SAMPLE = 0.5
"""The expected acceptance of a lone sample, 0.5 + 0.5 q_1^2, from the largest probability; a fit,
too."""
