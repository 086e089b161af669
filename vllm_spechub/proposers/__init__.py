# SPDX-License-Identifier: Apache-2.0
"""Proposers: what drafts a tree for every request.

A proposer is a speculator of vLLM's V2 runner (`BaseSpeculator`): it sees the target's hidden
states and may have a KV cache of its own, or none. A third party adds one from its own vLLM
plugin with `PROPOSERS.register("name", "package.module:Class")`.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig, VllmConfig

    from vllm_spechub.config import SpecHubConfig
    from vllm_spechub.rules.base import VerificationRule
    from vllm_spechub.rules.draft_state import DraftBuffers


class TreeProposer(Protocol):
    """What a proposer adds to vLLM's `BaseSpeculator`.

    `propose` returns the drafted tokens, [num_reqs, num_nodes of the largest tree] in node order,
    and leaves the draft's distributions in `draft_logits`. It asks `rule.sample_children` for every
    child. Its argument `num_speculative_tokens` says which of the schedule's trees to draft, 0 for
    none; it notes the choice in `model_state.drafted`.
    """

    vllm_method: ClassVar[str] = "draft_model"
    """The method that vLLM's configuration gets, by which its runner and scheduler decide."""
    options: ClassVar[frozenset[str]] = frozenset()
    """Keys of `--speculative-config` that only this proposer has; `check_options` checks their
    values, and `config.proposer_options` holds them."""
    needs_model: ClassVar[bool] = True
    """Whether `model` must be given."""

    draft_logits: "DraftBuffers"
    """vLLM passes this attribute to the rejection sampler, whatever it is."""

    def __init__(
        self, vllm_config: "VllmConfig", device: "torch.device", rule: "VerificationRule"
    ) -> None: ...

    @classmethod
    def check_options(cls, options: dict[str, Any], target_model_config: "ModelConfig") -> None:
        """Check the user's options before the draft's configuration is read.

        Raises:
            ValueError: one line that names the key and what is needed.
        """

    @classmethod
    def check_config(cls, config: "SpecHubConfig") -> None:
        """Check the finished configuration, before any weights are loaded.

        Raises:
            ValueError: one line that names the key and what is needed.
        """
