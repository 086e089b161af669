# SPDX-License-Identifier: Apache-2.0
"""Patches for a CPU worker that serves a spechub configuration, applied by `SpecHubCPUWorker`."""

import functools
import sys

from vllm_spechub.patches import Patch


def _rebind_kernels(original):
    @functools.wraps(original)
    def rebind_kernels(overrides):
        hidden = {name: sys.modules.pop(name) for name in [*sys.modules] if "llvmlite" in name}
        try:
            original(overrides)
        finally:
            sys.modules.update(hidden)

    return rebind_kernels


PATCHES = (
    Patch(
        symbol="vllm.triton_utils.dispatcher:_rebind_kernels",
        parameters=("overrides",),
        why="It inspects every attribute of every module and stops at llvmlite's library object, "
        "whose `__dict__` is no mapping. Our compiled kernels import Numba and so llvmlite.",
        how="Hides llvmlite's modules, which hold no kernels, while the original runs.",
        upstream="none yet",
        until="vLLM guards that look-up",
        replace=_rebind_kernels,
    ),
)
