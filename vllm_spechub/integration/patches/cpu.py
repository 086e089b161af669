# SPDX-License-Identifier: Apache-2.0
"""Patches for the CPU, applied in every process."""

import functools
import sys

from vllm_spechub.integration.patch import Patch


def _check_and_update_config(original):
    @functools.wraps(original)
    def check_and_update_config(cls, vllm_config):
        from vllm_spechub.config import is_spechub

        scheduler = vllm_config.scheduler_config
        decided = scheduler.async_scheduling
        original(cls, vllm_config)
        if is_spechub(vllm_config):
            scheduler.async_scheduling = decided

    return check_and_update_config


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
        symbol="vllm.platforms.cpu:CpuPlatform.check_and_update_config",
        parameters=("cls", "vllm_config"),
        why="On the CPU it switches asynchronous scheduling off as unnecessary. Synchronous "
        "scheduling sends every drafted token from the worker to the scheduler, and back one step "
        "later.",
        how="Calls the original; for spechub configurations, then restores what vLLM or the user "
        "had chosen.",
        upstream="none yet",
        until="vLLM keeps the configured choice",
        replace=_check_and_update_config,
    ),
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
