# SPDX-License-Identifier: Apache-2.0
"""A draft model that is also a member of a combined target.

It reads every batch of the target's in the member pass, before sampling. So its cache is as true as
the target's, whatever is drafted, and moves with it; to draft, it needs to read the new roots only.
"""

import torch
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer

from vllm_spechub.engine.combination import MemberBatch
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
        model_state.combination.bind(self)

    @torch.inference_mode()
    def member_rows(self, batch: MemberBatch) -> torch.Tensor:
        """Read the target's batch, and write its keys and values to the target's slots.

        Returns:
            The draft's logits at each of the target's rows, [num_rows, vocab_size]; -inf for tokens
            that the draft lacks.
        """
        tokens = batch.batch.input_ids[: len(batch.positions)]
        if self.draft_vocab_size < self.vocab_size:
            tokens = tokens.clamp(max=self.draft_vocab_size - 1)  # it has no rows for the others
        slots = build_slot_mappings_by_layer(batch.slot_mappings, self.kv_cache_config)
        metadata = batch.attention(self.attn_groups)
        hidden = self.run_model(tokens, batch.positions, metadata, slots, None)
        return self.compute_draft_logits(hidden[batch.batch.logits_indices], 0)

    def read(self, step: DraftStep) -> torch.Tensor:
        """Feed the roots. A trial is as wide as a member pass may be.

        Returns:
            Their hidden states, [num_reqs, hidden_size].
        """
        return (DraftModelProposer if step.dummy_run else RootFed).read(self, step)
