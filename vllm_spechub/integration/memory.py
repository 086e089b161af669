# SPDX-License-Identifier: Apache-2.0
"""The memory that speculation adds: weights, buffers, logits to verify, a share of the KV cache."""

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.linear import LinearBase

from vllm_spechub.config import spechub_config
from vllm_spechub.engine.processors import most_processed_rows

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


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


def most_rows(vllm_config: "VllmConfig") -> int:
    """The most rows of logits that the trees of a step are verified against: those of the requests
    that the schedule drafts a tree for, as far as the token budget lets them in."""
    scheduler, schedule = vllm_config.scheduler_config, spechub_config(vllm_config).schedule
    rows = max(
        reqs * (1 + tree.num_nodes)
        for tree, reqs in schedule.most_requests(scheduler.max_num_seqs).items()
    )
    return min(rows, scheduler.max_num_batched_tokens)


def verification_bytes(vllm_config: "VllmConfig") -> int:
    """The bytes that a step holds at most while it verifies: the target's hidden states and logits,
    and a part of the logits in fp32 with its copy, for requests with sampling parameters. For a
    combined target also the other members' logits, and of the part their rows and what is combined.
    """
    model = vllm_config.model_config
    vocab_size, size = model.get_vocab_size(), model.dtype.itemsize
    rows = most_rows(vllm_config)
    in_fp32 = min(rows, most_processed_rows(vocab_size))
    hidden = vllm_config.scheduler_config.max_num_batched_tokens * model.get_hidden_size() * size
    logits = rows * vocab_size * size
    fp32 = torch.float32.itemsize
    held = hidden + logits + in_fp32 * vocab_size * (size + fp32)
    target = spechub_config(vllm_config).target_distribution
    if target is not None:
        # a batch without trees is combined, too, and as a whole
        requests, others = vllm_config.scheduler_config.max_num_seqs, target.num_others
        held += max(rows, requests) * vocab_size * size * others
        held += max(in_fp32, requests) * vocab_size * (size * others + (2 + others) * fp32)
    return held
