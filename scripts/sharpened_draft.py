# SPDX-License-Identifier: Apache-2.0
"""A draft that knows something of its target: what a sharper draft than the demo pair's would do.

Its log-probabilities are a weighted mean of the draft's and the target's own. No engine runs it.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers import Cache, PreTrainedModel

from vllm_spechub.offline.simulation.texts import ModelPair


class Caches(NamedTuple):
    """Both models' caches, as far as a simulation asks them."""

    draft: Cache
    target: Cache

    def batch_select_indices(
        self,
        # [num_rows]
        indices: torch.Tensor,
    ) -> None:
        for cache in self:
            cache.batch_select_indices(indices)

    def get_seq_length(self) -> int:
        return self.draft.get_seq_length()


class SharpenedDraft:
    """Called like a model of transformers, it gives `(1 - share) log q + share log p`.

    Args:
        draft: gives q.
        target: gives p.
        share: of the target, 0 to 1.
    """

    def __init__(self, draft: PreTrainedModel, target: PreTrainedModel, share: float) -> None:
        self.models = {draft: 1.0 - share, target: share}
        self.dtype = draft.dtype

    def __call__(self, past_key_values: Caches | None = None, **arguments: Any) -> SimpleNamespace:
        caches = past_key_values or (None, None)
        outs = [
            model(past_key_values=cache, **arguments)
            for model, cache in zip(self.models, caches, strict=True)
        ]
        # [num_rows, num_tokens, vocab_size]
        logits = sum(
            weight * out.logits.log_softmax(dim=-1)
            for weight, out in zip(self.models.values(), outs, strict=True)
        )
        return SimpleNamespace(
            logits=logits, past_key_values=Caches(*(out.past_key_values for out in outs))
        )


def sharpened(pair: ModelPair, share: float) -> ModelPair:
    """A pair whose draft has so large a share of its target."""
    assert isinstance(pair.draft, PreTrainedModel), "heads cannot be sharpened"
    draft: Any = SharpenedDraft(pair.draft, pair.target, share)
    return replace(pair, draft=draft)
