# SPDX-License-Identifier: Apache-2.0
"""Heads, which draft from their target's hidden states: EAGLE-3, EAGLE and MTP layers.

A row of a head joins the hidden state at a position with the token after it, and predicts the token
after that one. Its RoPE position and KV slot are those of the hidden state, so all rows are shifted
by one. Below the root, the hidden state is the one that the head itself gave for the parent.

Every step first feeds what the target has just read and kept: its hidden states are gone
afterwards, so a head never pauses. The root's row is the last of them.

EAGLE (arXiv 2401.15077), EAGLE-3 (arXiv 2503.01840), MTP (arXiv 2412.19437, section 2.2); vLLM's
own chains of them are in `vllm/v1/worker/gpu/spec_decode/target_dependent_ar`.
"""

from typing import Any

import numpy as np
import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.model_loader.utils import get_model_cls
from vllm.model_executor.models.interfaces import supports_any_eagle, supports_eagle3
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.spec_decode.eagle.utils import load_eagle_model

from vllm_spechub.config import SpecHubConfig
from vllm_spechub.drafts.fit import TargetSize, check_fit, check_tokens
from vllm_spechub.drafts.kinds import (
    EAGLE,
    EAGLE3,
    MTP,
    named_head,
    tensor_names,
)
from vllm_spechub.engine.member_pass import eager_context
from vllm_spechub.proposers.base import DraftStep
from vllm_spechub.proposers.model_proposer import ModelProposer
from vllm_spechub.rules.base import VerificationRule
from vllm_spechub.rules.draft_state import DraftLevel, DraftState

MTP_ARCHITECTURES = ("MiMoMTPModel", "Glm4MoeMTPModel")
"""The MTP layers that may draft trees: others have recurrent layers or MLA, use the target's cache,
or are not tested."""


class HeadProposer(ModelProposer[torch.Tensor]):
    """Drafts with a head.

    From level to level it carries what the head gives for each node, [num_reqs * num_expanded, 1 or
    2, hidden_size]: the hidden state for its logits first, the one that its children are fed last.
    """

    captures_steps = True
    shift = 1

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, rule: VerificationRule
    ) -> None:
        super().__init__(vllm_config, device, rule)
        self.fed_size = self.hidden_size

    @classmethod
    def check_options(cls, options: dict[str, Any], target_model_config: ModelConfig) -> None:
        super().check_options(options, target_model_config)
        head = named_head(options, target_model_config)
        if head is not None and head.kind != cls.vllm_method:
            raise ValueError(
                f"speculative_config['proposer'] is {options['proposer']!r}, but "
                f"{options['model']!r} is none ({head.sign}); leave 'proposer' out"
            )
        # The first EAGLE heads call themselves a model, and their weights may not be here yet.
        unknown = cls.vllm_method == EAGLE and not any(
            tensor_names(options["model"], options.get("revision"))
        )
        if head is None and not unknown:
            raise ValueError(
                f"speculative_config['proposer'] is {options['proposer']!r}, but "
                f"{options['model']!r} is a model that runs by itself; leave 'proposer' out"
            )

    @classmethod
    def check_config(cls, config: SpecHubConfig) -> None:
        target = config.target_model_config
        if target.is_multimodal_model:
            raise ValueError(
                f"speculative_config['model'] is a head, but {target.architecture} is multimodal, "
                "and heads are tried on text models only; use a model that runs by itself"
            )
        check_fit(
            "speculative_config['model']",
            cls.vllm_method,
            config.draft_model_config.hf_text_config,
            TargetSize(
                target.get_hidden_size(),
                target.get_vocab_size(),
                target.get_total_num_hidden_layers(),
            ),
        )
        workers = config.target_parallel_config.tensor_parallel_size
        if config.draft_tensor_parallel_size != workers:
            raise ValueError(
                "speculative_config['draft_tensor_parallel_size'] is "
                f"{config.draft_tensor_parallel_size}, but a head is split like its target, over "
                f"{workers}; leave it out"
            )

    @property
    def attn_vllm_config(self) -> VllmConfig:
        """The configuration that the head's attention was built with."""
        return self.speculative_config.apply_draft_overrides(self.vllm_config)

    def load_draft_model(
        self, target_model: torch.nn.Module, target_attn_layer_names: set[str]
    ) -> torch.nn.Module:
        with self.own_sliding_window():
            return load_eagle_model(target_model, self.vllm_config)

    def run_model(
        self,
        # [num_tokens] int32
        tokens: torch.Tensor,
        # [num_tokens] int64
        positions: torch.Tensor,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        # [num_tokens, hidden_size]
        fed: torch.Tensor | None,
    ) -> torch.Tensor:
        with eager_context(self.vllm_config, len(tokens), attn_metadata, slot_mappings):
            given = self.model(input_ids=tokens, positions=positions, hidden_states=fed)
        if not isinstance(given, tuple):
            return given.unsqueeze(1)
        for_logits, feedback = given
        if for_logits is feedback:
            return feedback.unsqueeze(1)
        return torch.stack((for_logits, feedback), dim=1)

    def target_states(
        self,
        # [num_tokens, hidden_size]
        hidden_states: torch.Tensor,
        # each [num_tokens, hidden_size]
        aux_hidden_states: list[torch.Tensor] | None,
        # [num_rows] int64
        tokens: torch.Tensor,
    ) -> torch.Tensor:
        return hidden_states[tokens]

    def read(self, step: DraftStep) -> torch.Tensor:
        """Feed the tokens that the target has just read and kept, each with the token after it.

        Returns:
            What the head gives for the roots, [num_reqs, 1 or 2, hidden_size].
        """
        rows = self.fed_rows(self._rows_to_feed(step))
        places = step.batch.query_start_loc[rows.req] + self._kept_rows(step, rows.req, rows.local)
        states = self.target_states(step.hidden_states, step.aux_hidden_states, places)
        return self.feed(step, rows, step.first_positions, states)

    def _rows_to_feed(self, step: DraftStep) -> np.ndarray:
        """How many rows each request gets. [num_reqs] int64"""
        batch, trees, num_reqs = step.batch, self.request_trees, step.num_reqs
        counts = batch.num_scheduled_tokens[:num_reqs].astype(np.int64)
        if step.dummy_run:
            return counts
        depths = trees.depths_for(batch.idx_mapping_np)
        if self.device.type == "cpu":
            counts -= step.num_rejected.numpy()  # there is no device to wait for
        elif batch.num_draft_tokens_per_req is not None:
            counts -= np.maximum(batch.num_draft_tokens_per_req[:num_reqs] - depths, 0)
        return self.made_uniform(step, counts)

    def _kept_rows(
        self,
        step: DraftStep,
        # [num_rows] int64, the row's request
        req: torch.Tensor,
        # [num_rows] int64, the row's place among those of its request
        local: torch.Tensor,
    ) -> torch.Tensor:
        """Where each row's hidden state is among those of its request. [num_rows] int64

        A tree's nodes stand in breadth-first order after the root, which is the last of a request's
        ordinary tokens. Rows beyond what was kept point anywhere among those of the request.
        """
        batch, paths = step.batch, step.accepted_paths
        ordinary = batch.num_scheduled_tokens[: step.num_reqs].astype(np.int64)
        if paths is not None:
            assert batch.num_draft_tokens_per_req is not None  # since there are trees
            ordinary -= batch.num_draft_tokens_per_req[: step.num_reqs]
        root = async_tensor_h2d(ordinary - 1, device=self.device)[req]
        rows = torch.minimum(local, root)
        if paths is None:
            return rows
        depth = (local - root).clamp(min=0, max=paths.shape[1] - 1)
        return rows + paths[req, depth].clamp(min=0)

    def level_logits(
        self,
        step: DraftStep,
        depth: int,
        level: DraftLevel,
        state: DraftState,
        carried: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given = carried
        if depth > 0:
            parents = carried[level.rows(step.num_reqs).parent_rows, -1]
            given = self.run_level(step, depth, level, state, parents)
        return self.compute_draft_logits(given[:, 0], 0), given


class EagleProposer(HeadProposer):
    """Drafts with an EAGLE head, which reads the target's last hidden state."""

    vllm_method = EAGLE

    @classmethod
    def check_config(cls, config: SpecHubConfig) -> None:
        super().check_config(config)
        target = config.target_model_config
        if not supports_any_eagle(get_model_cls(target)):
            raise ValueError(
                f"speculative_config['model']: vLLM has no EAGLE for {target.architecture}; use a "
                "model that runs by itself"
            )


class Eagle3Proposer(HeadProposer):
    """Drafts with an EAGLE-3 head, which reads the outputs of several of the target's layers.

    Its vocabulary may be smaller than the target's. Then its logits are those of the target's
    tokens, -inf where the head has none, so that everything else speaks the target's ids.
    """

    vllm_method = EAGLE3

    @classmethod
    def check_config(cls, config: SpecHubConfig) -> None:
        super().check_config(config)
        target = config.target_model_config
        if not supports_eagle3(get_model_cls(target)):
            raise ValueError(
                f"speculative_config['model']: vLLM has no EAGLE-3 for {target.architecture}; use "
                "a model that runs by itself"
            )

    def load_draft_model(
        self, target_model: torch.nn.Module, target_attn_layer_names: set[str]
    ) -> torch.nn.Module:
        model = super().load_draft_model(target_model, target_attn_layer_names)
        offsets = model.draft_id_to_target_id
        if isinstance(offsets, torch.Tensor):
            draft = self.draft_model_config
            # what is missing in the checkpoint stays 0
            missing = not offsets.any() and "d2t" not in set(
                tensor_names(draft.model, draft.revision)
            )
            check_tokens(
                "speculative_config['model']",
                draft.model,
                None if missing else offsets,
                self.vocab_size,
            )
        return model

    def target_states(
        self,
        # [num_tokens, hidden_size]
        hidden_states: torch.Tensor,
        # each [num_tokens, hidden_size]
        aux_hidden_states: list[torch.Tensor] | None,
        # [num_rows] int64
        tokens: torch.Tensor,
    ) -> torch.Tensor:
        assert aux_hidden_states is not None  # since vLLM's method is eagle3
        states = torch.cat([layer[tokens] for layer in aux_hidden_states], dim=-1)
        model: Any = self.model
        return model.combine_hidden_states(states)


class MTPProposer(HeadProposer):
    """Drafts with an MTP layer, by default the target's own, which is the same at every depth."""

    vllm_method = MTP

    @classmethod
    def check_options(cls, options: dict[str, Any], target_model_config: ModelConfig) -> None:
        head = named_head(options, target_model_config)
        if options.get("model") is not None:
            super().check_options(options, target_model_config)
        elif head is None:
            raise ValueError(
                f"speculative_config['proposer'] is {options['proposer']!r}, but "
                f"{target_model_config.architecture} brings no MTP layer; name a draft as 'model', "
                "and leave 'proposer' out"
            )
        if head is not None and head.layers > 1:
            raise ValueError(
                f"speculative_config['proposer'] is {options['proposer']!r}, but there are "
                f"{head.layers} MTP layers, each for a depth of its own; allowed: 1, which drafts "
                "all depths"
            )

    @classmethod
    def check_config(cls, config: SpecHubConfig) -> None:
        architecture = config.draft_model_config.architecture
        if architecture not in MTP_ARCHITECTURES:
            raise ValueError(
                f"speculative_config['proposer'] is {config.proposer!r}, but MTP layers that vLLM "
                f"loads as {architecture} cannot draft trees, allowed: "
                f"{', '.join(MTP_ARCHITECTURES)}; name a draft as 'model', and leave 'proposer' out"
            )
        super().check_config(config)
