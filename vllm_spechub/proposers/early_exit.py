# SPDX-License-Identifier: Apache-2.0
"""The target's own first layers as the draft (LayerSkip, Elhoushi et al., arXiv 2404.16710).

The draft has no weights and no cache of its own. The target has written the accepted tokens into
the cache of its first layers, and compaction has moved them, so that a step feeds the draft nothing
but the new roots, and then the nodes. Both go to the slots of the next step's tree, which
verification writes again: what the target has computed below a root is never touched.
"""

from typing import Any

import numpy as np
import torch
from vllm.config import ModelConfig

from vllm_spechub.attention.visibility import TreeVisibility
from vllm_spechub.engine.member_pass import eager_context
from vllm_spechub.proposers import first_layers
from vllm_spechub.proposers.base import DraftStep
from vllm_spechub.proposers.root_feed import RootFed

EXIT_LAYER = "exit_layer"


class EarlyExitProposer(RootFed):
    """Drafts with the target's first layers.

    From level to level it carries hidden states, [num_reqs * num_expanded, hidden_size].
    """

    options = frozenset({EXIT_LAYER})
    needs_model = False

    @classmethod
    def check_options(cls, options: dict[str, Any], target_model_config: ModelConfig) -> None:
        super().check_options(options, target_model_config)
        if EXIT_LAYER not in options:
            raise ValueError(
                "speculative_config['exit_layer'] is missing: after how many of the target's "
                "layers the draft's distribution is read"
            )
        first_layers.check_cut(EXIT_LAYER, options[EXIT_LAYER], target_model_config, 1)
        if target_model_config.uses_mrope:
            raise ValueError(
                f"speculative_config['proposer'] is 'early_exit', but the positions of "
                f"{target_model_config.architecture} have several dimensions (M-RoPE), and a "
                "draft's have one; use a text draft as 'model'"
            )

    @classmethod
    def vllm_options(cls, target_model_config: ModelConfig) -> dict[str, Any]:
        """The draft is the target, as vLLM reads it a second time."""
        return {
            "model": target_model_config.model,
            "revision": target_model_config.revision,
            "code_revision": target_model_config.code_revision,
        }

    @property
    def exit_layer(self) -> int:
        return self.config.proposer_options[EXIT_LAYER]

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Take the target's first layers. Nothing is loaded."""
        layers, vllm_config = self.exit_layer, self.vllm_config
        self.model = first_layers.shared(target_model, layers, vllm_config)
        self.draft_attn_layer_names = first_layers.attention_layers(
            target_model, layers, vllm_config
        )

    def load_draft_model(
        self, target_model: torch.nn.Module, target_attn_layer_names: set[str]
    ) -> torch.nn.Module:
        raise AssertionError("nothing is loaded")

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
        with eager_context(self.vllm_config, len(tokens), attn_metadata, slot_mappings):
            return self.model(input_ids=tokens, positions=positions)

    def run_pass(
        self,
        step: DraftStep,
        # [num_tokens] integers
        tokens: torch.Tensor,
        # [num_tokens] int64, RoPE positions
        positions: torch.Tensor,
        # [num_tokens] int64, sequence positions of the KV slots
        slots: torch.Tensor,
        # [num_reqs + 1] int32
        starts: torch.Tensor,
        # [num_reqs + 1] int32
        starts_np: np.ndarray,
        # [num_reqs]
        seq_lens: torch.Tensor,
        # [num_tokens] bool, rows that must write nothing
        unused: torch.Tensor | None,
        # None for ordinary causal tokens
        tree: TreeVisibility | None,
        # [num_tokens, fed_size]
        fed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As for any proposer, but while a request's prompt is read, its rows write nothing: the
        tokens in their slots are the prompt's, and the slots may belong to nobody yet."""
        batch = step.batch
        if batch.is_prefilling_np[: step.num_reqs].any() and not step.dummy_run:
            prompt_ends = self.req_states.prefill_len.gpu[batch.idx_mapping]
            in_prompt = step.root_positions < prompt_ends
            unused = in_prompt.repeat_interleave(len(tokens) // step.num_reqs)
        return super().run_pass(
            step, tokens, positions, slots, starts, starts_np, seq_lens, unused, tree, fed
        )
