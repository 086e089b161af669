# SPDX-License-Identifier: Apache-2.0
"""A correction that vLLM 0.32's own chain needs on the CPU above temperature 0.

vLLM's host version of `expand_kernel` fills an int64 copy of a float output and drops it, so
verification divides by uninitialised temperatures. Loaded into the chain engine's workers with
`worker_extension_cls`; nothing of spechub is in it.
"""

import torch
from vllm.triton_utils.dispatcher import register_kernels

from vllm_spechub.measure.benchmark.worker import Observed


def expand_kernel(
    # [num_tokens]
    output: torch.Tensor,
    # [batch_size]
    values: torch.Tensor,
    # [batch_size]
    cu_num_tokens: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """Repeat each request's value over its tokens, replacing one value by another."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(values == replace_from, replace_to, values)
    output[: int(cu_num_tokens[-1])] = torch.repeat_interleave(values, counts).to(output.dtype)


class FixedChain(Observed):
    """vLLM imports this module into each worker after it registered its own host kernels."""


register_kernels({"vllm.v1.sample.rejection_sampler.expand_kernel": expand_kernel})
