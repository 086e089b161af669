# SPDX-License-Identifier: Apache-2.0
"""`MemberPass`: a model that reads the target's own batch, with KV cache layers of its own.

It writes its keys and values to the target's slots wherever the target writes its own, so its cache
is as true as the target's, whatever is drafted, and moves with it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from vllm.compilation.backends import set_model_tag
from vllm.config import CUDAGraphMode, ModelConfig, VllmConfig, replace
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader import get_model
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer, init_attn_backend
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.utils import AttentionGroup

from vllm_spechub.config import BesideTarget


@dataclass(frozen=True)
class MemberBatch:
    """The target's batch as another member reads it."""

    batch: InputBatch
    # [num_tokens] int64, RoPE positions
    positions: torch.Tensor
    # each KV cache group's slots, [num_kv_cache_groups, num_tokens] int64
    slot_mappings: torch.Tensor
    # attention groups -> the metadata of their layers for this batch, with trees as the target's
    attention: Callable[[list[list[Any]]], dict[str, Any]]


class MemberPass:
    """Runs one member.

    Args:
        name: for the start-up summary.
        model: the loaded network.
        config: of the network.
        layer_names: of its attention layers.
        vllm_config: the engine's.
        attn_vllm_config: what its attention layers were built with.
    """

    def __init__(
        self,
        name: str,
        model: torch.nn.Module,
        config: ModelConfig,
        layer_names: set[str],
        vllm_config: VllmConfig,
        attn_vllm_config: VllmConfig,
    ) -> None:
        self.name = name
        self.model: Any = model
        self.layer_names = layer_names
        self.vllm_config = vllm_config
        self.attn_vllm_config = attn_vllm_config
        self.own_vocab_size = config.get_vocab_size()
        self.vocab_size = vllm_config.model_config.get_vocab_size()
        self.kv_cache_config: KVCacheConfig
        self.attn_groups: list[list[AttentionGroup]] = []

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, device: torch.device) -> None:
        """Take what is known of the KV cache: which layers share blocks."""
        self.kv_cache_config = kv_cache_config
        self.attn_groups, *_ = init_attn_backend(
            kv_cache_config, self.attn_vllm_config, device, active_layer_names=self.layer_names
        )

    @torch.inference_mode()
    def rows(self, batch: MemberBatch) -> torch.Tensor:
        """Read the target's batch, and write its keys and values to the target's slots.

        Returns:
            Logits at each of the target's rows, [num_rows, vocab_size of the target]; -inf for
            tokens that the member lacks.
        """
        tokens = batch.batch.input_ids[: len(batch.positions)]
        if self.own_vocab_size < self.vocab_size:
            tokens = tokens.clamp(max=self.own_vocab_size - 1)  # it has no rows for the others
        slots = build_slot_mappings_by_layer(batch.slot_mappings, self.kv_cache_config)
        hidden = self._run(tokens, batch.positions, batch.attention(self.attn_groups), slots)
        logits = self.model.compute_logits(hidden[batch.batch.logits_indices])
        missing = self.vocab_size - self.own_vocab_size  # below 0, its padding is cut off
        return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)

    @torch.inference_mode()
    def try_out(self, num_tokens: int, device: torch.device) -> None:
        """Take a pass as wide as there may be, without a KV cache."""
        tokens = torch.zeros(num_tokens, dtype=torch.int32, device=device)
        self._run(tokens, tokens.long(), None, None)

    def _run(
        self,
        # [num_tokens]
        tokens: torch.Tensor,
        # [num_tokens]
        positions: torch.Tensor,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        with eager_context(self.vllm_config, len(tokens), attn_metadata, slot_mappings):
            hidden = self.model(input_ids=tokens, positions=positions)
        return hidden[0] if isinstance(hidden, tuple) else hidden


def eager_context(
    vllm_config: VllmConfig,
    num_tokens: int,
    attn_metadata: dict[str, Any] | None,
    slot_mappings: dict[str, torch.Tensor] | None,
) -> AbstractContextManager[None]:
    """What vLLM's layers need to know of a pass that is no graph's by itself."""
    return set_forward_context(
        attn_metadata,
        vllm_config,
        num_tokens=num_tokens,
        cudagraph_runtime_mode=CUDAGraphMode.NONE,
        slot_mapping=slot_mappings,
        batch_descriptor=BatchDescriptor(num_tokens=num_tokens),
    )


def with_own_window(vllm_config: VllmConfig, model: ModelConfig) -> VllmConfig:
    """An engine's configuration in which a network that is loaded has its own sliding window, where
    vLLM would give it the target's."""
    layer_types = getattr(model.hf_text_config, "layer_types", None)
    # As vLLM decides for a target: layers of several types each know their own window.
    uniform = layer_types is None or set(layer_types) == {"sliding_attention"}
    window = model.get_sliding_window() if uniform else None
    own = copy(vllm_config)
    own.cache_config = replace(vllm_config.cache_config, sliding_window=window)
    return own


def load_member(name: str, member: BesideTarget, vllm_config: VllmConfig) -> MemberPass:
    """Load a further member, as vLLM loads a draft model.

    Args:
        name: the beginning of the names of its layers, which no other model has.
    """
    config = member.draft_model_config
    windowed = with_own_window(vllm_config, config)
    parallel = replace(member.draft_parallel_config, rank=vllm_config.parallel_config.rank)
    parallel.data_parallel_index = vllm_config.parallel_config.data_parallel_index
    own = replace(windowed, model_config=config, quant_config=None, parallel_config=parallel)
    layers = vllm_config.compilation_config.static_forward_context
    others = set(layers)
    with set_model_tag(name):
        model = get_model(vllm_config=own, prefix=name)
    names = {
        layer for layer in set(layers) - others if isinstance(layers[layer], AttentionLayerBase)
    }
    return MemberPass(config.model, model, config, names, vllm_config, vllm_config)
