# SPDX-License-Identifier: Apache-2.0
"""The target's model state: tree inputs before the forward pass, tree sampling after it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import SamplingStates
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_spechub.attention.visibility import TreeAttnMetadata
from vllm_spechub.config import spechub_config
from vllm_spechub.engine.combination import Combination, CombiningSampler
from vllm_spechub.engine.compaction import PathCompactor
from vllm_spechub.engine.layout import TreeLayout
from vllm_spechub.engine.member_pass import MemberBatch, load_member
from vllm_spechub.engine.platform import Platform
from vllm_spechub.engine.processors import HistoryProcessors
from vllm_spechub.engine.request_trees import RequestTrees
from vllm_spechub.engine.sampler import TreeRejectionSampler
from vllm_spechub.rules.base import build_rule


class TreeModelState(DefaultModelState):
    """`DefaultModelState` for batches whose requests may carry a draft tree.

    Within a worker, everything else learns about requests from here, above all the proposer.

    Args:
        platform: supplies the compactor and the verification rule's kernels.

    Attributes:
        request_trees: what the worker remembers of each request's drafts.
        sampling_states: each request's sampling parameters; set by `custom_sampler`, which vLLM
            calls when the target is loaded.
        req_states: each request's tokens; set by `custom_sampler`, too.
        combination: of the target's rows and other members'; None where the target's own
            distribution is verified.
    """

    request_trees: RequestTrees
    sampling_states: SamplingStates
    req_states: RequestState

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: torch.nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
        platform: Platform,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.config = spechub_config(vllm_config)
        self.platform = platform
        self.request_trees = RequestTrees(self.config.schedule, self.max_num_reqs, device)
        self.layout = TreeLayout(self.request_trees, self.max_num_tokens, device)
        self.combination: Combination | None = None
        if self.config.target_distribution is not None:
            self.combination = Combination(
                self.config.target_distribution,
                [
                    load_member(f"member_{i}", member, vllm_config)
                    for i, member in enumerate(self.config.members)
                ],
                self.max_num_reqs,
                self.max_num_tokens,
                device,
            )
        self.compactor = PathCompactor(vllm_config, platform)
        self.bind_compactor: Callable[[], None]

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        self.request_trees.add_request(req_index)
        if self.combination is not None:
            self.combination.add_request(req_index, new_req_data.sampling_params)

    def apply_staged_writes(self) -> None:
        super().apply_staged_writes()
        if self.combination is not None:
            self.combination.apply_staged_writes()

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables
    ) -> None:
        # The worker binds, once the caches are those of the engine: vLLM makes and drops others to
        # learn how much memory its graphs take, and a bound compactor would keep them alive.
        self.bind_compactor = partial(self.compactor.bind, kv_cache_config, block_tables)
        for member in self.combination.members if self.combination is not None else ():
            member.initialize_kv_cache(kv_cache_config, self.device)

    def wake_up(self) -> None:
        """Restore the small tensors whose contents sleep mode discards."""
        self.layout.place_tables()
        self.bind_compactor()

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        kwargs["model_specific_attn_metadata"] = TreeAttnMetadata(self.layout.update(input_batch))
        # Backends whose graphs read visibility from buffers read the layout's.
        for group in chain.from_iterable(attn_groups):
            share = getattr(group.get_metadata_builder(), "share_visibility", None)
            if share is not None:
                share(self.layout.buffers.visible_until, self.layout.buffers.tree_mask)
        prepare = super().prepare_attn
        if self.combination is not None:
            # The member pass is never a graph's, so it has none of the padding.
            tables = tuple(table[: input_batch.num_reqs] for table in block_tables)
            slots = slot_mappings[:, : input_batch.num_tokens]

            def attention(groups: list[list[AttentionGroup]]) -> dict[str, Any]:
                mode = CUDAGraphMode.NONE
                return prepare(input_batch, mode, tables, slots, groups, kv_cache_config, **kwargs)

            positions = self.layout.buffers.positions[: input_batch.num_tokens]
            self.combination.stage(MemberBatch(input_batch, positions, slots, attention))
        return prepare(
            input_batch,
            cudagraph_mode,
            block_tables,
            slot_mappings,
            attn_groups,
            kv_cache_config,
            *args,
            **kwargs,
        )

    def prepare_inputs(
        self, input_batch: InputBatch, req_states: RequestState
    ) -> dict[str, torch.Tensor | None]:
        self._map_adapters_to_rows(input_batch)
        num_tokens = input_batch.num_tokens_after_padding
        positions = self.layout.positions[:num_tokens]
        # M-RoPE: [num_dims, num_tokens], by slots. All dimensions of a text token's positions are
        # its slot plus the request's offset, so they differ by depth as ordinary positions do.
        by_slot = super().prepare_inputs(input_batch, req_states).get("positions")
        if by_slot is None:
            return {"positions": positions}
        if input_batch.num_draft_tokens:
            by_slot += positions - input_batch.positions[:num_tokens]
            # vLLM knows no positions of the placeholders below a prompt's last token
            by_slot.clamp_(min=0)
        return {"positions": by_slot}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        # A captured graph reads these buffers on every replay: ours, or those of M-RoPE, and the
        # embeddings if prompts may have images.
        ours = {"positions": self.layout.positions[:num_tokens]}
        return ours | super().prepare_dummy_inputs(num_reqs, num_tokens)

    def _map_adapters_to_rows(self, input_batch: InputBatch) -> None:
        """Give every logits row its request's LoRA adapter. vLLM's V2 runner gives the adapters to
        one row per request."""
        manager: Any = getattr(self.model, "lora_manager", None)
        if manager is None or not input_batch.num_draft_tokens:
            return
        mapping = manager._last_mapping
        rows = np.repeat(mapping.prompt_mapping, np.diff(input_batch.cu_num_logits_np))
        manager.set_adapter_mapping(replace(mapping, prompt_mapping=tuple(rows)))

    def custom_sampler(self, sampler: Sampler) -> tuple[Sampler, TreeRejectionSampler]:
        history = HistoryProcessors(sampler.logits_processors, self.max_num_reqs)
        sampler.logits_processors = [history]
        self.sampling_states, self.req_states = sampler.sampling_states, sampler.req_states
        if self.combination is not None:
            self.combination.history = history
            sampler = CombiningSampler.of(sampler, self.combination)
        rejection_sampler = TreeRejectionSampler(
            sampler,
            self.config,
            self.device,
            build_rule(self.config, self.platform.tree_kernels()),
            history,
            self.request_trees,
            self.compactor,
            self.layout,
            self.combination,
        )
        return sampler, rejection_sampler
