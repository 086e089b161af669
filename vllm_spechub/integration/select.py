# SPDX-License-Identifier: Apache-2.0
"""Names our worker, scheduler and attention backend in a spechub configuration."""

from typing import TYPE_CHECKING

from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_spechub.integration import patches
from vllm_spechub.integration.classes import SCHEDULERS, TRITON_BACKEND, WORKERS
from vllm_spechub.integration.patch import apply_all
from vllm_spechub.integration.refusals import engine_refusals, model_refusals, raise_first

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def prepare_engine(vllm_config: "VllmConfig") -> None:
    """Refuse what draft trees cannot do yet, then name our worker and attention backend.

    Runs whenever vLLM validates an engine's configuration, before any weights are loaded.

    Raises:
        Unsupported: one line that names the setting and what to use instead.
    """
    raise_first(engine_refusals(vllm_config))
    raise_first(model_refusals(vllm_config.model_config))
    raise_first(model_refusals(vllm_config.speculative_config.draft_model_config))
    scheduler = vllm_config.scheduler_config
    scheduler.scheduler_cls = SCHEDULERS[bool(scheduler.async_scheduling)]
    parallel = vllm_config.parallel_config
    if current_platform.is_cpu():
        parallel.worker_cls = WORKERS["cpu"]
        apply_all(
            patches.CPU_WORKER
        )  # for a worker in this process, where Numba may be loaded already
    else:
        parallel.worker_cls = WORKERS["cuda"]
        register_backend(AttentionBackendEnum.CUSTOM, TRITON_BACKEND)
        vllm_config.attention_config.backend = AttentionBackendEnum.CUSTOM
    if parallel.distributed_executor_backend == "ray":
        # needs Ray, which is there if it is asked for
        from vllm_spechub.integration.ray_executor import SpecHubRayExecutor

        parallel.distributed_executor_backend = SpecHubRayExecutor
