# SPDX-License-Identifier: Apache-2.0
"""vLLM's own Triton kernels, interpreted on a CPU, to compare host kernels with.

Triton reads `TRITON_INTERPRET`, and vLLM looks for Triton backends, when they are first imported.
So the folder's conftest sets the variable, and this module must be imported before vLLM.
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
    """The part of a Triton driver that vLLM looks at to decide whether there is a Triton."""

    @staticmethod
    def is_active() -> bool:
        return True


triton.backends.backends.setdefault("cpu", SimpleNamespace(driver=_CpuDriver, compiler=None))


def _boolean(mask: interpreter.TensorHandle) -> interpreter.TensorHandle:
    return interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)


class _Builder(interpreter.InterpreterBuilder):
    """Triton's interpreter, with masks of any integer type, which the compiler takes."""

    def create_masked_load(self, ptrs, mask, *rest):
        return super().create_masked_load(ptrs, _boolean(mask), *rest)

    def create_masked_store(self, ptrs, value, mask, *rest):
        return super().create_masked_store(ptrs, value, _boolean(mask), *rest)


interpreter.interpreter_builder.__class__ = _Builder

from vllm.triton_utils import HAS_TRITON
from vllm.triton_utils.dispatcher import KernelOverride

from vllm_spechub.integration.platforms.cpu import host_kernels

assert HAS_TRITON

# The interpreter has no external functions.
import_module("vllm.v1.worker.gpu.metrics.logits").libdevice = SimpleNamespace(
    isnan=lambda value: value != value
)
# vLLM assumes unified memory on a CPU, but then pins it, which needs an accelerator.
import_module("vllm.v1.worker.gpu.buffer_utils").is_uva_available = lambda: False


@contextmanager
def host_kernels_called() -> Iterator[None]:
    """Let vLLM's launchers, within the block, call the host kernels as its registry calls them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, impl in host_kernels().items():
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
    """Run `scenario` with Triton and with host kernels, and compare what it returns.

    A scenario draws its inputs from the generator that it gets, and returns every tensor that a
    kernel may have written to. Unwritten memory has the same poison in both runs.
    """
    expected = scenario(np.random.default_rng(seed))
    with host_kernels_called():
        actual = scenario(np.random.default_rng(seed))
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)


def ints(values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Integers that numpy drew, as a tensor."""
    return torch.as_tensor(np.asarray(values)).to(dtype)


def floats(values: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Floats that numpy drew, as a tensor."""
    return torch.as_tensor(np.asarray(values)).to(dtype)


def bounds(counts: np.ndarray) -> torch.Tensor:
    """Cumulative counts with a leading zero."""
    return ints(np.concatenate([[0], np.cumsum(counts)]))


def strided(tensor: torch.Tensor, padding: int = 3) -> torch.Tensor:
    """The same `[rows, cols]` values, with poison between the rows."""
    rows, cols = tensor.shape
    wide = torch.empty(rows, cols + padding, dtype=tensor.dtype)
    wide[:, :cols] = tensor
    return wide[:, :cols]
