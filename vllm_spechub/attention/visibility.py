# SPDX-License-Identifier: Apache-2.0
"""Which keys a query token sees: one rule for decodes, prefills, trees and truncated trees."""

from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata


@dataclass(frozen=True)
class TreeVisibility:
    """Which keys each token of a batch sees.

    A key at sequence position s is visible to token t if `s < visible_until[t]`, or if bit
    `s - visible_until[t]` of `tree_mask[t]` is set. An ordinary token at position p has
    `visible_until = p + 1` and an empty mask. A tree's root and nodes have the root's position and
    the bits of their ancestors and themselves, so siblings do not see each other.
    """

    # [num_tokens] int32
    visible_until: torch.Tensor
    # [num_tokens] int64, bit i stands for tree node i
    tree_mask: torch.Tensor
    # [num_reqs] on the host: how many of a request's last tokens belong to a tree, 0 without one
    num_tree_tokens: np.ndarray


@dataclass(frozen=True)
class TreeAttnMetadata(ModelSpecificAttnMetadata):
    """Carries the visibility to the attention metadata builders that understand it."""

    tree: TreeVisibility

    def get_extra_attn_kwargs(self, attn_metadata_builder, num_reqs: int) -> dict:
        if getattr(attn_metadata_builder, "accepts_tree", False):
            return {"tree": self.tree}
        return {}
