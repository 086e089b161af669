# SPDX-License-Identifier: Apache-2.0
"""A request's top-k, top-p and min-p on the draft's rows, as vLLM applies them to the target's.

Tokens that the target rules out cannot be accepted: a draft that proposed them would waste nodes.
"""

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.sample.states import SamplingStates


def truncates(
    states: SamplingStates,
    # [num_reqs]
    reqs: np.ndarray,
) -> np.ndarray:
    """Which requests use top-k, top-p or min-p. [num_reqs] bool

    Greedy requests do not count, because none of these changes a greedy token.
    """
    return (states.temperature.np[reqs] != 0.0) & (
        (states.top_k.np[reqs] != states.vocab_size)
        | (states.top_p.np[reqs] != 1.0)
        | (states.min_p.np[reqs] != 0.0)
    )


def truncate(
    # [num_reqs * num_rows_each, vocab_size], a request's rows side by side; before temperature
    logits: torch.Tensor,
    states: SamplingStates,
    # [num_reqs] int64
    idx_mapping: torch.Tensor,
    # [num_reqs]
    reqs: np.ndarray,
    # [num_chosen] places in the batch of the requests that use one of the parameters
    chosen: np.ndarray,
) -> None:
    """Set the logits of tokens that the chosen requests' parameters rule out to -inf, in place."""
    if len(chosen) == 0:
        return
    each = logits.shape[0] // len(reqs)
    rows_np = (chosen[:, None] * each + np.arange(each)).flatten()
    rows = async_tensor_h2d(rows_np, device=logits.device)
    kept = logits[rows]
    # [num_rows, vocab_size], processed exactly as the target's rows are
    scaled = kept.to(torch.float32, copy=True)
    row_idx = idx_mapping[rows // each]
    states.apply_temperature(scaled, row_idx, reqs[chosen])
    states.apply_min_p(scaled, row_idx, reqs[chosen])
    scaled = states.apply_top_k_top_p(scaled, row_idx, reqs[chosen])
    logits[rows] = kept.masked_fill_(scaled == -torch.inf, -torch.inf)
