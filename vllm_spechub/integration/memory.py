# SPDX-License-Identifier: Apache-2.0
"""The memory that speculation adds: weights, buffers, logits to verify, a share of the KV cache."""

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.linear import LinearBase

from vllm_spechub.config import spechub_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


def tensor_bytes(owner: object) -> int:
    """The bytes of the tensors that an object holds as attributes."""
    tensors = [value for value in vars(owner).values() if isinstance(value, torch.Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def weight_bytes(
    model: torch.nn.Module, dtype: torch.dtype, target: torch.nn.Module | None = None
) -> int:
    """The bytes of this rank's weights, including those that vLLM's CPU kernels have repacked.

    Args:
        model: the model, with its weights loaded.
        dtype: of the repacked weights, which have left the module.
        target: a model that shares modules with this one; they do not count.
    """
    shared = set(target.modules()) if target is not None else set()
    own = [module for module in model.modules() if module not in shared]
    parameters = {p for module in own for p in module.parameters(recurse=False)}
    total: int = sum(parameter.nbytes for parameter in parameters)
    for layer in own:
        weight = getattr(layer, "weight", None)
        if isinstance(layer, LinearBase) and weight is not None and weight.numel() == 0:
            # A layer that every rank holds whole has no sizes of a partition.
            inputs: int = getattr(layer, "input_size_per_partition", layer.input_size)
            outputs: int = getattr(layer, "output_size_per_partition", layer.output_size)
            total += inputs * outputs * dtype.itemsize
    return total


def kv_cache_share(
    kv_cache_config: "KVCacheConfig",
    layer_names: set[str],
    sharing: Collection[str] = (),
) -> float:
    """The share of every KV cache block that the named layers take, from 0 to 1.

    Args:
        sharing: layers that use another layer's cache and have none.
    """
    ours = total = 0
    for group in kv_cache_config.kv_cache_groups:
        per_layer = getattr(group.kv_cache_spec, "kv_cache_specs", {})
        for name in set(group.layer_names).difference(sharing):
            size = per_layer.get(name, group.kv_cache_spec).page_size_bytes
            total += size
            ours += size * (name in layer_names)
    return ours / total if total else 0.0


def verification_bytes(vllm_config: "VllmConfig") -> int:
    """The bytes of the target's logits for a full batch of the largest trees, in the model's dtype
    and again in fp32 for sampling parameters, beyond one row per request.

    vLLM's profiling run, which sizes the KV cache, has that one row per request.
    """
    scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
    nodes = spechub_config(vllm_config).num_speculative_tokens
    rows = min(scheduler.max_num_seqs * (1 + nodes), scheduler.max_num_batched_tokens)
    rows -= min(scheduler.max_num_seqs, rows)
    return rows * model.get_vocab_size() * (model.dtype.itemsize + torch.float32.itemsize)
