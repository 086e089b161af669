# SPDX-License-Identifier: Apache-2.0
"""CUDA: Triton's kernels."""

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_spechub.engine.platform import CacheKernels, Platform
from vllm_spechub.rules.base import TreeKernels
from vllm_spechub.triton_kernels.tree_attention import MAX_HEAD_SIZE


def _cache_kernels() -> CacheKernels:
    from vllm_spechub.triton_kernels.compaction import KVCompactor

    # [num_blocks, num_kv_heads, block_size, 2 * head_size]: keys and values move side by side
    return CacheKernels(lambda kv_cache: [kv_cache.transpose(1, 2)], KVCompactor)


def _tree_kernels() -> TreeKernels:
    from vllm_spechub.rules.kernel_rule import PORTABLE_KERNELS

    return PORTABLE_KERNELS


CUDA = Platform(
    worker="vllm_spechub.integration.worker.SpecHubWorker",
    vllm_worker="vllm.v1.worker.gpu_worker.Worker",
    attention_backend="vllm_spechub.attention.triton_backend.TritonTreeBackend",
    backend_entry=AttentionBackendEnum.CUSTOM,
    names_backend=True,
    max_head_size=MAX_HEAD_SIZE,
    cache_kernels=_cache_kernels,
    tree_kernels=_tree_kernels,
)
