# SPDX-License-Identifier: Apache-2.0
"""The CPU worker: trees, tree attention, and host versions of the V2 runner's Triton kernels."""

from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_spechub.cpu import vllm_kernels
from vllm_spechub.cpu.tree_kernels.warm_up import warm_up
from vllm_spechub.integration import patches
from vllm_spechub.integration.patch import apply_all
from vllm_spechub.integration.worker import SpecHubWorker


class SpecHubCPUWorker(SpecHubWorker, CPUWorker):
    """vLLM's CPU worker with trees. Where a Triton compiler exists for the CPU it is used."""

    def init_device(self) -> None:
        apply_all(patches.CPU_WORKER)
        register_backend(
            AttentionBackendEnum.CPU_ATTN, "vllm_spechub.attention.cpu_backend.CPUTreeBackend"
        )
        # an engine before this one in the same process may have chosen vLLM's own
        selector._cached_get_attn_backend.cache_clear()
        vllm_kernels.register()
        warm_up()
        super().init_device()
