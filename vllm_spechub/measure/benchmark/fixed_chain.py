# SPDX-License-Identifier: Apache-2.0
"""A correction that vLLM 0.32's own chain needs on the CPU above temperature 0.

vLLM's host version of `expand_kernel` writes into an int64 copy of a float output and discards it,
so verification divides by uninitialised temperatures. `worker_extension_cls` loads this module into
the chain engine's workers. It contains nothing of spechub.
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
    """Repeat each request's value for all its tokens, and replace one value by another."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(values == replace_from, replace_to, values)
    output[: int(cu_num_tokens[-1])] = torch.repeat_interleave(values, counts).to(output.dtype)


class FixedChain(Observed):
    """A worker whose vLLM imports this module after it has registered its own host kernels."""


register_kernels({"vllm.v1.sample.rejection_sampler.expand_kernel": expand_kernel})
