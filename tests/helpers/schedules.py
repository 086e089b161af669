# SPDX-License-Identifier: Apache-2.0
"""Trees by batch size, and requests that make the batch size change."""

from vllm import SamplingParams

SCHEDULE = [[1, 2, "binary:3"], [3, 4, "chain:2"], [5, None, None]]
LENGTHS = (8, 14, 20, 26, 34, 42)  # requests end one after the other, so every width has its turn


def params(**options):
    options = {"temperature": 0, "ignore_eos": True} | options
    return [SamplingParams(max_tokens=length, **options) for length in LENGTHS]
