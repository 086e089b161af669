# SPDX-License-Identifier: Apache-2.0
"""A draft model that is also a member of a combined target.

It reads every batch of the target's in the member pass, before sampling. So its cache is as true as
the target's, whatever is drafted, and moves with it; to draft, it needs to read the new roots only.
"""

import torch

from vllm_spechub.engine.member_pass import MemberPass
from vllm_spechub.engine.model_state import TreeModelState
from vllm_spechub.proposers.base import DraftStep
from vllm_spechub.proposers.draft_model import DraftModelProposer
from vllm_spechub.proposers.root_feed import RootFed


class DraftMember(RootFed, DraftModelProposer):
    """Drafts with a smaller model of the same vocabulary, whose rows are combined with the
    target's."""

    def bind(self, model_state: TreeModelState) -> None:
        super().bind(model_state)
        assert model_state.combination is not None  # else nothing chooses this proposer
        member = MemberPass(
            self.draft_model_config.model,
            self.model,
            self.draft_model_config,
            self.draft_attn_layer_names,
            self.vllm_config,
            self.attn_vllm_config,
        )
        model_state.combination.members.insert(0, member)

    def read(self, step: DraftStep) -> torch.Tensor:
        """Feed the roots. A trial is as wide as a member pass may be.

        Returns:
            Their hidden states, [num_reqs, hidden_size].
        """
        return (DraftModelProposer if step.dummy_run else RootFed).read(self, step)
