# SPDX-License-Identifier: Apache-2.0
"""The CPU: kernels compiled by Numba, also in the place of vLLM's Triton kernels."""

from collections.abc import Callable
from functools import cache

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_spechub.engine.platform import CacheKernels, Platform
from vllm_spechub.integration import versions
from vllm_spechub.rules.base import TreeKernels


def _cache_kernels() -> CacheKernels:
    from vllm_spechub.attention.cpu_backend import cache_views
    from vllm_spechub.cpu.tree_kernels.compaction import HostKVCompactor

    return CacheKernels(cache_views, HostKVCompactor)


def _tree_kernels() -> TreeKernels:
    from vllm_spechub.cpu.tree_kernels.allocation import allocate_children
    from vllm_spechub.cpu.tree_kernels.sampling import sample_children, verify_tree, write_tokens

    return TreeKernels(sample_children, verify_tree, write_tokens, allocate_children)


def host_kernels() -> dict[str, Callable[..., None]]:
    """The stand-ins for the running vLLM's Triton kernels, by the kernels' qualified names."""
    from vllm_spechub.cpu.vllm_kernels import HOST_KERNELS

    return {**HOST_KERNELS, **versions.current().host_kernels()}


@cache
def register_host_kernels() -> None:
    """Put the stand-ins in their kernels' place. A second call does nothing."""
    from vllm_spechub.cpu import vllm_kernels

    vllm_kernels.register(host_kernels())


def _prepare_worker() -> None:
    from vllm_spechub.cpu.tree_kernels.warm_up import warm_up

    register_host_kernels()
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
