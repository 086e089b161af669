# SPDX-License-Identifier: Apache-2.0
"""Where Ray places an engine."""

from typing import Any


def placement() -> dict[str, Any]:
    """Ray's options for an engine, on the platform that vLLM runs on here."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    # Ray would reserve a GPU for every engine.
    return {
        "placement_group_config": {"bundles": [{"CPU": 1}]},
        "runtime_env": {"env_vars": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}},
    }
