# SPDX-License-Identifier: Apache-2.0
"""`Platform`: everything that differs between the kinds of processors that trees run on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_spechub.rules.base import TreeKernels


class Compactor(Protocol):
    """Moves the KV of accepted paths in the layers of one KV cache group, in place."""

    def __call__(
        self,
        # [num_reqs, max_num_blocks] int32
        block_table: torch.Tensor,
        # [num_reqs] int64
        root_positions: torch.Tensor,
        # [num_reqs, depth + 1] int32: the accepted node of each depth; -1 past the end
        path: torch.Tensor,
    ) -> None: ...


class CacheKernels(NamedTuple):
    """How a platform stores keys and values, and how it moves them."""

    # a layer's cache -> views of its keys and values, each
    # [num_blocks, block_size, num_kv_heads, content]
    cache_views: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    # the views of all layers of a KV cache group -> their compactor
    compactor: Callable[[Sequence[torch.Tensor]], Compactor]


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Platform:
    """What the rest of the package must know about one kind of processor.

    The callables import what they return, so that naming a platform imports no compiler.

    Attributes:
        worker: path of our worker's class, as vLLM imports it.
        vllm_worker: path of vLLM's class, which our worker replaces.
        attention_backend: path of our attention backend's class.
        backend_entry: the entry of vLLM's registry that names our backend while layers choose it.
        names_backend: whether the engine's configuration must name the entry; otherwise vLLM
            chooses it by itself on this platform.
        max_head_size: of an attention head, the largest that the backend supports.
        cache_kernels: views of KV caches in our backend's layout, and their compactor.
        tree_kernels: the functions that draw children and verify trees.
        prepare_worker: prepares a worker's process, before its device is set up.
    """

    worker: str
    vllm_worker: str
    attention_backend: str
    backend_entry: AttentionBackendEnum
    names_backend: bool
    max_head_size: int
    cache_kernels: Callable[[], CacheKernels]
    tree_kernels: Callable[[], TreeKernels]
    prepare_worker: Callable[[], None] = _nothing
