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
        why="It turns asynchronous scheduling off, as not needed on the CPU. The scheduler then "
        "takes every drafted token from the worker and hands it back a step later.",
        how="Calls the original, then restores for spechub configurations what vLLM or the user "
        "had decided.",
        upstream="none yet",
        until="vLLM leaves the choice to its configuration",
        replace=_check_and_update_config,
    ),
)
