# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter runs vLLM's kernels, and memory that nobody wrote shows."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator

import pytest
import torch

import helpers.interpreted  # noqa: F401


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fills new tensors, so that an entry that a kernel left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
