# SPDX-License-Identifier: Apache-2.0
"""The CPU: kernels compiled by Numba, also in the place of vLLM's Triton kernels."""

import functools
import sys

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_spechub.engine.platform import CacheKernels, Platform
from vllm_spechub.integration.patch import Patch, apply_all
from vllm_spechub.rules.base import TreeKernels


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
        why="It inspects every attribute of every module, and fails at llvmlite's library object, "
        "whose `__dict__` is not a mapping. Our compiled kernels import Numba, which imports "
        "llvmlite.",
        how="Hides llvmlite's modules, which contain no kernels, while the original runs.",
        upstream="none yet",
        until="vLLM guards against such objects",
        replace=_rebind_kernels,
    ),
)


def _cache_kernels() -> CacheKernels:
    from vllm_spechub.attention.cpu_backend import cache_views
    from vllm_spechub.cpu.tree_kernels.compaction import HostKVCompactor

    return CacheKernels(cache_views, HostKVCompactor)


def _tree_kernels() -> TreeKernels:
    from vllm_spechub.cpu.tree_kernels.sampling import sample_children, verify_tree, write_children

    return TreeKernels(sample_children, verify_tree, write_children)


def _prepare_process() -> None:
    apply_all(PATCHES)


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
    cache_kernels=_cache_kernels,
    tree_kernels=_tree_kernels,
    prepare_process=_prepare_process,
    prepare_worker=_prepare_worker,
)
