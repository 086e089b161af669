# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the kernel tests: poisoned allocations and ahead-of-time compilation."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import pytest

from helpers.aot_compile import Compiler
from helpers.devices import DEVICE


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return tensor
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype == torch.bool else 113)


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """Fill fresh memory with NaN (113 for integers), so that an element nobody wrote shows."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, f=original, **k: _poison(f(*a, **k)))


@pytest.fixture(autouse=True)
def single_thread():
    """Small tensors gain nothing from threads, and lose much when cores are shared."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def compile_for():
    """`compile_for(kernel, signature, constexprs, capability, num_warps)`: see `Compiler`."""
    compiler = Compiler()
    yield compiler
    compiler.close()


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: on the CPU under the interpreter, else on the GPU."""
    return DEVICE
