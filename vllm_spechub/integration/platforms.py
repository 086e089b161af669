# SPDX-License-Identifier: Apache-2.0
"""The platforms that trees run on, one record each."""

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_spechub.engine.platform import CacheKernels, Platform
from vllm_spechub.integration.patch import apply_all
from vllm_spechub.integration.patches import cpu
from vllm_spechub.rules.kernel_rule import Kernels


def _nothing() -> None:
    pass


def _cpu_cache_kernels() -> CacheKernels:
    from vllm_spechub.attention.cpu_backend import cache_views
    from vllm_spechub.cpu.tree_kernels.compaction import HostKVCompactor

    return CacheKernels(cache_views, HostKVCompactor)


def _cpu_tree_kernels() -> Kernels:
    from vllm_spechub.cpu.tree_kernels.sampling import sample_children, verify_tree, write_children

    return Kernels(sample_children, verify_tree, write_children)


def _prepare_cpu_process() -> None:
    apply_all(cpu.PATCHES)


def _prepare_cpu_worker() -> None:
    from vllm_spechub.cpu import vllm_kernels
    from vllm_spechub.cpu.tree_kernels.warm_up import warm_up

    vllm_kernels.register()
    warm_up()


def _triton_cache_kernels() -> CacheKernels:
    from vllm_spechub.attention.triton_backend import cache_views
    from vllm_spechub.triton_kernels.compaction import KVCompactor

    return CacheKernels(cache_views, KVCompactor)


def _triton_tree_kernels() -> Kernels:
    from vllm_spechub.rules.draft_state import DraftState
    from vllm_spechub.triton_kernels.child_sampling import sample_children
    from vllm_spechub.triton_kernels.verification import verify_tree

    return Kernels(sample_children, verify_tree, DraftState.write_children)


PLATFORMS = {
    "cpu": Platform(
        worker="vllm_spechub.integration.cpu_worker.SpecHubCPUWorker",
        vllm_worker="vllm.v1.worker.cpu_worker.CPUWorker",
        attention_backend="vllm_spechub.attention.cpu_backend.CPUTreeBackend",
        backend_entry=AttentionBackendEnum.CPU_ATTN,
        names_backend=False,
        cache_kernels=_cpu_cache_kernels,
        tree_kernels=_cpu_tree_kernels,
        prepare_process=_prepare_cpu_process,
        prepare_worker=_prepare_cpu_worker,
    ),
    "cuda": Platform(
        worker="vllm_spechub.integration.worker.SpecHubWorker",
        vllm_worker="vllm.v1.worker.gpu_worker.Worker",
        attention_backend="vllm_spechub.attention.triton_backend.TritonTreeBackend",
        backend_entry=AttentionBackendEnum.CUSTOM,
        names_backend=True,
        cache_kernels=_triton_cache_kernels,
        tree_kernels=_triton_tree_kernels,
        prepare_process=_nothing,
        prepare_worker=_nothing,
    ),
}
"""The platforms, by the names that vLLM gives its own (`current_platform.device_name`)."""
