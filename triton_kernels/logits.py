# SPDX-License-Identifier: Apache-2.0
"""Rows of logits in plain PyTorch, whatever a model has put into them."""

import torch

from .constants import LOWEST


def finite(
    # [..., vocab_size] any float dtype
    logits: torch.Tensor,
) -> torch.Tensor:
    """Finite float32: NaN and -inf, which mask a token, as LOWEST, and +inf as -LOWEST.

    A masked token still ranks above one that is taken out, whose logit is -inf.
    """
    return logits.to(torch.float32).nan_to_num(LOWEST, -LOWEST, LOWEST).clamp(LOWEST, -LOWEST)
