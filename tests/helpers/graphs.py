# SPDX-License-Identifier: Apache-2.0
"""A stand-in for CUDA graphs on the CPU: it records what is called, and calls it again with the
same tensors.

As with a graph, whatever Python computed meanwhile is not computed again, so a value that changes
from step to step and does not come from a tensor is stale in a replay. Reading a number from a
tensor is an error. (`tolist` and `numpy` are not seen: arrays of the host are tensors here, too.)
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from vllm.forward_context import (
    get_forward_context,
    is_forward_context_available,
    override_forward_context,
)

READS = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero"}


class RecordedGraph(TorchDispatchMode):
    """Records the operations within, and the functions that are to count as one."""

    recording: ClassVar["RecordedGraph | None"] = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __enter__(self):
        RecordedGraph.recording = self
        return super().__enter__()

    def __exit__(self, *error):
        RecordedGraph.recording = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.").partition(".")[0]
        if name in READS:
            raise AssertionError(f"{name} reads a tensor on the host within a graph")
        return self.record(function, args, kwargs or {})

    def record(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        context = get_forward_context() if is_forward_context_available() else None
        RecordedGraph.recording = None  # what it calls belongs to it
        try:
            with _disable_current_modes():
                result = function(*args, **kwargs)
        finally:
            RecordedGraph.recording = self
        self.calls.append((function, args, kwargs, result, context))
        return result

    @torch.inference_mode()
    def replay(self) -> None:
        for function, args, kwargs, result, context in self.calls:
            with override_forward_context(context):
                again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def as_one(function: Callable) -> Callable:
    """The function, which a recording calls as a whole, whatever it does with its tensors."""

    @wraps(function)
    def called(*args, **kwargs):
        graph = RecordedGraph.recording
        if graph is None:
            return function(*args, **kwargs)
        return graph.record(function, args, kwargs)

    return called
