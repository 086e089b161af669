# SPDX-License-Identifier: Apache-2.0
"""The CPU: kernels compiled by Numba, also in the place of vLLM's Triton kernels."""

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_spechub.engine.platform import CacheKernels, Platform
from vllm_spechub.rules.base import TreeKernels


def _cache_kernels() -> CacheKernels:
    from vllm_spechub.attention.cpu_backend import cache_views
    from vllm_spechub.cpu.tree_kernels.compaction import HostKVCompactor

    return CacheKernels(cache_views, HostKVCompactor)


def _tree_kernels() -> TreeKernels:
    from vllm_spechub.cpu.tree_kernels.sampling import sample_children, verify_tree, write_children

    return TreeKernels(sample_children, verify_tree, write_children)


def _prepare_worker() -> None:
    from vllm_spechub.cpu import vllm_kernels
    from vllm_spechub.cpu.tree_kernels.warm_up import warm_up

    vllm_kernels.register()
    warm_up()


CPU = Platform(
    worker="vllm_spechub.integration.cpu_worker.SpecHubCPUWorker",
    vllm_worker="vllm.v1.worker.cpu_worker.CPUWorker",
    attention_backend="vllm_spechub.attention.cpu_backend.CPUTreeBackend",
    backend_entry=AttentionBackendEnum.CPU_ATTN,
    names_backend=False,
    max_head_size=512,  # as vLLM's own kernel
    cache_kernels=_cache_kernels,
    tree_kernels=_tree_kernels,
    prepare_worker=_prepare_worker,
)
