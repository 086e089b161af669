# SPDX-License-Identifier: Apache-2.0
"""A separate draft model that expands the tree level by level.

Every step first feeds the accepted tokens to the draft, which also gives the root's children, and
then runs one pass for each further depth.

While a schedule asks for no tree, the draft skips the steps in which every request decodes, and
reads what it missed when the schedule asks for trees again.
"""

from typing import Any

import numpy as np
import torch
from vllm.config import ModelConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

from vllm_spechub.config import AUTO, SpecHubConfig
from vllm_spechub.drafts.alone import check_fit, head_in
from vllm_spechub.proposers import first_layers
from vllm_spechub.proposers.base import DraftStep
from vllm_spechub.proposers.model_proposer import ModelProposer
from vllm_spechub.targets.base import OPTION
from vllm_spechub.trees.measured_schedule import measured_layers

DRAFT_LAYERS = "draft_layers"
"""The option that cuts a draft after so many of its layers."""


class DraftModelProposer(ModelProposer[torch.Tensor], StandaloneARSpeculator):
    """Drafts with a smaller model of the same vocabulary.

    From level to level it carries hidden states, [num_reqs * num_expanded, hidden_size].
    """

    captures_steps = True
    options = frozenset({DRAFT_LAYERS})

    # whether a layer has a sliding window, so that vLLM may free its blocks after any step
    has_windows: bool

    @classmethod
    def own_options(
        cls, options: dict[str, Any], target_model_config: ModelConfig
    ) -> dict[str, Any]:
        own = super().own_options(options, target_model_config)
        if own.get(DRAFT_LAYERS) == AUTO:
            if options.get(OPTION) is not None:
                raise ValueError(
                    "speculative_config['draft_layers'] is 'auto', but `vllm-spechub tune` "
                    "measures without 'target_distribution'; give a whole number"
                )
            try:
                own[DRAFT_LAYERS] = measured_layers(target_model_config.model, options["model"])
            except ValueError as error:
                raise ValueError(f"speculative_config[{DRAFT_LAYERS!r}]: {error}") from None
        return own

    @classmethod
    def check_config(cls, config: SpecHubConfig) -> None:
        draft, target = config.draft_model_config, config.target_model_config
        head = head_in(draft)
        if head is not None:
            raise ValueError(
                f"speculative_config['model']: {draft.model!r} drafts from the target's hidden "
                f"states ({head.sign}), but proposer {config.proposer!r} needs a model that runs "
                "by itself; choose another draft, or leave 'proposer' out"
            )
        layers = config.proposer_options.get(DRAFT_LAYERS)
        if layers is not None:
            first_layers.check_cut(DRAFT_LAYERS, layers, draft, 0)
        check_fit("speculative_config['model']", "draft", draft, target)

    def load_draft_model(
        self, target_model: torch.nn.Module, target_attn_layer_names: set[str]
    ) -> torch.nn.Module:
        layers = self.config.proposer_options.get(DRAFT_LAYERS)
        with self.own_sliding_window():
            if layers is None:
                return super().load_draft_model(target_model, target_attn_layer_names)
            self.draft_model_config = first_layers.marked(self.draft_model_config, layers)
            with first_layers.built_with(layers):
                model = super().load_draft_model(target_model, target_attn_layer_names)
        first_layers.check_built(model, layers)
        return model

    def set_attn(
        self,
        model_state: ModelState,
        kv_cache_config: KVCacheConfig,
        block_tables: BlockTables,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().set_attn(model_state, kv_cache_config, block_tables, *args, **kwargs)
        self.has_windows = any(
            getattr(group.kv_cache_spec, "sliding_window", None) is not None
            for group in kv_cache_config.kv_cache_groups
            if self.draft_attn_layer_names.intersection(group.layer_names)
        )

    def run_model(
        self,
        # [num_tokens] int32
        tokens: torch.Tensor,
        # [num_tokens] int64
        positions: torch.Tensor,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        fed: torch.Tensor | None,
    ) -> torch.Tensor:
        return self._run_model(tokens, positions, attn_metadata, slot_mappings, None)

    def may_pause(self, batch: InputBatch) -> bool:
        """Whether every request decodes its next token.

        Prompts are never put off, since the prefix cache hands their blocks to other requests, and
        a draft with sliding windows puts nothing off, since vLLM may free its blocks.
        """
        decodes = batch.num_draft_tokens == 0 and not batch.is_prefilling_np.any()
        return self.schedule.pauses and decodes and not self.has_windows

    def read(self, step: DraftStep) -> torch.Tensor:
        """Feed the tokens that the draft has not read, then the new root.

        For a verified tree, the number of rows is the most that can have been accepted below its
        root, a bound that is known without waiting for the device.

        Returns:
            The roots' hidden states, [num_reqs, hidden_size].
        """
        lags, skipped, counts = self._rows_to_feed(step)
        rows, first, lagging = self.fed_rows(counts), step.first_positions, bool(lags.any())
        if skipped.all():  # a root each, as usual
            first = first + 1
        elif skipped.any():
            first = first + async_tensor_h2d(skipped, device=self.device)
        if lagging:
            unread = self.request_trees.next_unread_position(step.batch.idx_mapping)
            first = torch.where(async_tensor_h2d(lags, device=self.device), unread, first)
        if self.schedule.pauses and not step.dummy_run:
            end = first + torch.diff(rows.starts)
            read = torch.minimum(end, step.root_positions)
            self.request_trees.record_read(step.batch.idx_mapping, read)
        return self.feed(step, rows, first, lagging=lagging)

    def already_read(
        self,
        # [num_reqs]
        drafts: np.ndarray,
    ) -> np.ndarray:
        """The root of each tree, which was read to draft it. [num_reqs]"""
        return (drafts > 0).astype(np.int64)

    def _rows_to_feed(self, step: DraftStep) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which requests' drafts lag, [num_reqs] bool; how many of each request's scheduled tokens
        the draft has already read, [num_reqs]; and how many rows each request gets, [num_reqs]."""
        batch, trees, num_reqs = step.batch, self.request_trees, step.num_reqs
        lengths = batch.num_scheduled_tokens[:num_reqs].astype(np.int64)
        skipped = np.zeros_like(lengths)
        if step.dummy_run:
            return skipped > 0, skipped, lengths + 1
        reqs = batch.idx_mapping_np
        lag = trees.draft_lag(reqs)
        if batch.num_draft_tokens_per_req is not None:
            drafts = batch.num_draft_tokens_per_req[:num_reqs]
            if self.device.type == "cpu":
                lengths -= step.num_rejected.numpy()  # there is no device to wait for
            else:
                lengths -= np.maximum(drafts - trees.depths_for(reqs), 0)
            # The draft has read a tree's root to draft it. A tree below a prompt's token is only a
            # placeholder.
            skipped += (drafts > 0) & ~batch.is_prefilling_np[:num_reqs] & (lag == 0)
        counts = lengths - skipped + 1
        if not lag.any():
            counts = self.made_uniform(step, counts)
        # The rows that this step leaves free are for the requests that lag.
        room = int(self.max_num_tokens - counts.sum())
        return lag > 0, skipped, counts + trees.catch_up(reqs, room)
