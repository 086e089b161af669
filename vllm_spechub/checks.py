# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the engine-free library: every refusal names its argument."""

import torch


def check_probs(
    name: str,
    # [..., vocab_size]
    probs: torch.Tensor,
    shape: tuple[int, ...] | None = None,
) -> None:
    """Refuse what is not a batch of distributions over the last dimension."""
    if not isinstance(probs, torch.Tensor) or not probs.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor")
    if shape is not None and tuple(probs.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, not {list(probs.shape)}")
    if probs.dim() == 0 or probs.shape[-1] == 0:
        raise ValueError(f"{name} must be [..., vocab_size], not {list(probs.shape)}")
    # A comparison with NaN is false, so each test is put the way that lets NaN fail.
    if not bool((probs >= 0).all()):
        raise ValueError(f"{name} has negative entries or NaN")
    wide = probs if probs.dtype == torch.float64 else probs.float()
    tolerance = 1e-3 if probs.element_size() > 2 else 2e-2
    off = (wide.sum(dim=-1) - 1).abs()
    if not bool((off <= tolerance).all()):
        raise ValueError(f"{name} has rows that do not sum to 1 (off by {off.max().item():.3g})")
