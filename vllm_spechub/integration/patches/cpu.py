# SPDX-License-Identifier: Apache-2.0
"""Patches of the configuration on the CPU. Those of its worker are in `platforms.cpu`."""

import functools

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
)
