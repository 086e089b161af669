# SPDX-License-Identifier: Apache-2.0
"""Counts what this package would launch on a GPU in each step of an engine on the CPU.

Each operation of PyTorch that is not a view counts, each kernel, replayed graph, product with the
LM head, and copy from the host. What happens within one of the latter does not.
"""

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "diff_view",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "permute",
    "resolve_conj",
    "resolve_neg",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unflatten",
    "unsqueeze",
    "view",
}


MAY_BE_VIEWS = {"contiguous", "flatten", "reshape", "to"}


class _Operations(TorchDispatchMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.").partition(".")[0]
        result = function(*args, **(kwargs or {}))
        if name not in VIEWS and not (name in MAY_BE_VIEWS and _same_memory(result, args[0])):
            self.note(name)
        return result


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr()


class Launches:
    """The launches of each step, by what was launched.

    Attributes:
        steps: a counter for each step; `("read", "add")` counts additions within `read`.
    """

    def __init__(self) -> None:
        self.steps: list[Counter] = []
        self._stage: str | None = None
        self._quiet = False

    def note(self, name: str, count: int = 1) -> None:
        if self._stage is not None and not self._quiet:
            self.steps[-1][self._stage, name] += count

    @contextmanager
    def quiet(self):
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def stage(self, name: str, function: Callable, *, begins: bool = False) -> Callable:
        """The function, whose operations count as those of a stage, and which may begin a step."""

        @wraps(function)
        def counted(*args, **kwargs):
            if begins:
                self.steps.append(Counter())
            if self._stage is not None or not self.steps:
                return function(*args, **kwargs)
            self._stage = name
            try:
                with _Operations(self.note):
                    return function(*args, **kwargs)
            finally:
                self._stage = None

        return counted

    def one(self, name: str, function: Callable) -> Callable:
        """The function, which counts as one launch."""

        @wraps(function)
        def counted(*args, **kwargs):
            self.note(name)
            with self.quiet():
                return function(*args, **kwargs)

        return counted

    def of_launcher(self, launcher: Callable, function: Callable) -> Callable:
        """The function, which counts as what the launcher of a Triton kernel does instead."""

        launch = with_kernels(launcher, lambda kernel: _Kernel(self.note))

        def counted(*args: Any, **kwargs: Any):
            launch(*args, **kwargs)
            with self.quiet():
                return function(*args, **kwargs)

        return counted


def with_kernels(
    launcher: Callable, fake: Callable[[triton.JITFunction], Any]
) -> Callable[..., None]:
    """The launcher, with something else in the place of each kernel of its module."""
    kernels = vars(sys.modules[launcher.__module__])
    fakes = {
        name: fake(value)
        for name, value in kernels.items()
        if isinstance(value, triton.JITFunction)
    }

    def launch(*args: Any, **kwargs: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name, stand_in in fakes.items():
                patch.setitem(kernels, name, stand_in)
            launcher(*args, **kwargs)

    return launch


class _Kernel:
    def __init__(self, note: Callable[[str], None]) -> None:
        self.note = note

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.note("Triton")
