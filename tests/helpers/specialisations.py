# SPDX-License-Identifier: Apache-2.0
"""What Triton would compile: it compiles a kernel anew for each key of the arguments of a launch,
which says dtypes, whether addresses and integers are multiples of 16, which integers are 1, what is
None, and every constant."""

from collections.abc import Callable
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature

from helpers.launches import with_kernels

HOPPER = CUDABackend(GPUTarget("cuda", 90, 32))


class Specialisations:
    """The keys that were launched with.

    Attributes:
        found: by a kernel's name and its key, [(argument, what the key says of it), ...].
    """

    def __init__(self) -> None:
        self.found: set[tuple[str, tuple]] = set()

    def noted(self, launcher: Callable, function: Callable) -> Callable:
        """The function, before which a launcher of Triton kernels notes what it would launch."""
        launch = with_kernels(launcher, lambda kernel: _Noted(kernel, self.found))

        def call(*args: Any, **kwargs: Any) -> Any:
            launch(*args, **kwargs)
            return function(*args, **kwargs)

        return call


class _Noted:
    def __init__(self, kernel: triton.JITFunction, found: set) -> None:
        self.name, self.found = kernel.__name__, found
        self.bind = create_function_from_signature(kernel.signature, kernel.params, HOPPER)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            arguments, key, options = self.bind(*args, **kwargs)
            named = zip(arguments, map(str, key), strict=True)
            self.found.add((self.name, (*named, *sorted(options.items()))))

        return launch
