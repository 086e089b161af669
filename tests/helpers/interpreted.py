# SPDX-License-Identifier: Apache-2.0
"""vLLM's own Triton kernels on a CPU, by Triton's interpreter, to compare host kernels with.

Triton reads `TRITON_INTERPRET` and vLLM looks for Triton backends when they are first imported, so
the folder's conftest sets the variable, and this comes before any import of vLLM.
"""
# ruff: noqa: E402 (vLLM must not be imported before the interpreter is ready)

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.backends
from triton.runtime import interpreter


class _CpuDriver:
    """As much of a Triton driver as vLLM asks for before it believes in Triton."""

    @staticmethod
    def is_active() -> bool:
        return True


triton.backends.backends.setdefault("cpu", SimpleNamespace(driver=_CpuDriver, compiler=None))


def _boolean(mask: interpreter.TensorHandle) -> interpreter.TensorHandle:
    return interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)


class _Builder(interpreter.InterpreterBuilder):
    """Takes masks of any integer type, as the compiler does."""

    def create_masked_load(self, ptrs, mask, *rest):
        return super().create_masked_load(ptrs, _boolean(mask), *rest)

    def create_masked_store(self, ptrs, value, mask, *rest):
        return super().create_masked_store(ptrs, value, _boolean(mask), *rest)


interpreter.interpreter_builder.__class__ = _Builder

from vllm.triton_utils import HAS_TRITON
from vllm.triton_utils.dispatcher import KernelOverride

from vllm_spechub.cpu.vllm_kernels import HOST_KERNELS

assert HAS_TRITON

# The interpreter has no external functions.
import_module("vllm.v1.worker.gpu.metrics.logits").libdevice = SimpleNamespace(
    isnan=lambda value: value != value
)
# vLLM counts a CPU as having unified memory, but pins that, which only an accelerator can.
import_module("vllm.v1.worker.gpu.buffer_utils").is_uva_available = lambda: False


@contextmanager
def host_kernels() -> Iterator[None]:
    """Within, vLLM's launchers reach the host kernels, called as its registry calls them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, impl in HOST_KERNELS.items():
            module, attribute = name.rsplit(".", 1)
            original = getattr(import_module(module), attribute)
            patch.setattr(name, KernelOverride(original, impl))
        yield


def assert_host_matches(
    scenario: Callable[[np.random.Generator], Any],
    seed: int,
    rtol: float = 0.0,
    atol: float = 0.0,
) -> None:
    """Runs `scenario` with Triton and with host kernels: what it returns must be the same.

    A scenario draws its inputs from the generator it is given, and returns every tensor that a
    kernel may have written to. Memory that nobody wrote has the same poison in both runs.
    """
    expected = scenario(np.random.default_rng(seed))
    with host_kernels():
        actual = scenario(np.random.default_rng(seed))
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)


def ints(values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """A tensor of what numpy drew."""
    return torch.as_tensor(np.asarray(values)).to(dtype)


def floats(values: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of what numpy drew."""
    return torch.as_tensor(np.asarray(values)).to(dtype)


def bounds(counts: np.ndarray) -> torch.Tensor:
    """Cumulative counts with a leading zero."""
    return ints(np.concatenate([[0], np.cumsum(counts)]))


def strided(tensor: torch.Tensor, padding: int = 3) -> torch.Tensor:
    """The same `[rows, cols]` values in rows that lie apart, with poison between."""
    rows, cols = tensor.shape
    wide = torch.empty(rows, cols + padding, dtype=tensor.dtype)
    wide[:, :cols] = tensor
    return wide[:, :cols]
