# SPDX-License-Identifier: Apache-2.0
"""Verification rules: how a node's children are drawn, and how a drawn tree is accepted.

The two halves are one law, so one class holds both. A third party adds a rule from its own vLLM
plugin with `RULES.register("name", "package.module:Class")`.
"""

from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch

from vllm_spechub.registry import RULES

if TYPE_CHECKING:
    from vllm_spechub.config import SpecHubConfig
    from vllm_spechub.rules.draft_state import DraftLevel, DraftState


class VerifiedPaths(NamedTuple):
    """What verification emits for every request."""

    # [num_reqs, depth + 1] int64: accepted tokens, then the bonus token; -1 past the end
    tokens: torch.Tensor
    # [num_reqs] int32: accepted tokens plus the bonus token
    num_emitted: torch.Tensor
    # [num_reqs, depth + 1] int32: the accepted node of each depth, 0 first; -1 past the end
    path: torch.Tensor

    def padded(self, width: int) -> "VerifiedPaths":
        """The same in `width` columns."""
        missing = (0, width - self.path.shape[1])
        pad = partial(torch.nn.functional.pad, pad=missing, value=-1)
        return VerifiedPaths(pad(self.tokens), self.num_emitted, pad(self.path))

    def where(
        self,
        # [num_reqs] bool
        chosen: torch.Tensor,
        other: "VerifiedPaths",
    ) -> "VerifiedPaths":
        """These for the chosen requests, the other's for the rest."""
        columns = chosen.unsqueeze(1)
        return VerifiedPaths(
            torch.where(columns, self.tokens, other.tokens),
            torch.where(chosen, self.num_emitted, other.num_emitted),
            torch.where(columns, self.path, other.path),
        )


class VerificationRule(ABC):
    """A lossless pair of a drafting law and its acceptance test.

    What is emitted must have exactly the target's distribution, whatever the draft's is. Random
    draws are functions of (seed, root position, node, purpose), never of a global generator:
    every tensor-parallel rank draws alone and must draw alike.
    """

    name: ClassVar[str]

    def __init__(self, config: "SpecHubConfig") -> None:
        """The drafting side and the verifying side each build one from the configuration."""
        self.config = config

    @classmethod
    def check_config(cls, config: "SpecHubConfig") -> None:
        """Refuse what this rule cannot do, before any weights are loaded; a rule that reads
        `config.sharpening` overrides this.

        Raises:
            ValueError: one line that names the key and what is allowed.
        """
        if config.sharpening != 1.0:
            raise ValueError(
                f"speculative_config['sharpening']: verification {config.verification!r} does not "
                "read it; leave it out"
            )

    @abstractmethod
    def sample_children(
        self,
        # [num_reqs * num_expanded, vocab_size], a request's nodes side by side
        logits: torch.Tensor,
        level: "DraftLevel",
        # [num_reqs] int64, request-state index
        idx_mapping: torch.Tensor,
        # [num_reqs] int64
        root_positions: torch.Tensor,
        # [max_num_reqs] float32
        temperature: torch.Tensor,
        # [max_num_reqs] int64
        seeds: torch.Tensor,
        state: "DraftState",
    ) -> None:
        """Draw the children of a level's nodes and store them in `state`."""

    @abstractmethod
    def verify(
        self,
        # [num_rows, vocab_size], a request's rows in node order, the root's first
        target_logits: torch.Tensor,
        # [num_reqs] int32, each request's first row
        row_start: torch.Tensor,
        # [num_reqs] int32, drafted nodes that were checked: the tree may be truncated
        num_nodes: torch.Tensor,
        # [num_rows] int64, the token of each row's node
        node_tokens: torch.Tensor,
        # [num_reqs] int64, request-state index
        idx_mapping: torch.Tensor,
        # [num_reqs] int64
        root_positions: torch.Tensor,
        # [max_num_reqs] float32, what `target_logits` are still to be divided by; 0 for greedy
        target_temperature: torch.Tensor,
        # [max_num_reqs] float32
        draft_temperature: torch.Tensor,
        # [max_num_reqs] int64
        seeds: torch.Tensor,
        state: "DraftState",
    ) -> VerifiedPaths:
        """Walk every request's tree and emit tokens with the target's distribution."""


def build_rule(config: "SpecHubConfig") -> VerificationRule:
    """The configured rule."""
    return RULES.load(config.verification)(config)
