# SPDX-License-Identifier: Apache-2.0
"""Distributions of a model or a head at tree nodes below roots in the middle of texts."""

from typing import TYPE_CHECKING, Union, cast

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from vllm_spechub.offline.simulation.texts import ModelPair, Roots

if TYPE_CHECKING:
    from vllm_spechub.offline.heads import OfflineHead


class TreeRows:
    """Reads trees level by level: one forward pass per level, for all roots at once.

    Every root has a row of the batch, with its text's keys and values in the cache. Nodes (here the
    root is one, too) see the text before their root and their ancestors, by a four-dimensional
    attention mask; their position is the root's plus their depth.

    Args:
        model: the model that reads.
        roots: where the trees begin.
    """

    shift = 0
    """By how much the position of a token's row is lower than the token's own."""

    @torch.inference_mode()
    def __init__(self, model: Union[PreTrainedModel, "OfflineHead"], roots: Roots) -> None:
        self._model = model
        self._position = roots.position.unsqueeze(1) - self.shift
        self._cache = self._read_texts(roots)
        self._cache.batch_select_indices(roots.text)
        # [num_roots, 1, length]: the text before the root
        text = torch.arange(self._cache.get_seq_length(), device=roots.texts.device)
        self._text = (text < self._position).unsqueeze(1)
        # [num_roots, num_columns, num_columns]: which columns a column sees
        self._seen = torch.zeros(len(roots.text), 0, 0, dtype=torch.bool, device=text.device)
        self._depth = 0

    def _read_texts(self, roots: Roots) -> Cache:
        """Read the texts. Returns the cache that the nodes' rows will be added to."""
        out = self._model(input_ids=roots.texts, use_cache=True, logits_to_keep=1)
        return out.past_key_values

    def _read_nodes(
        self,
        # [num_roots, num_new]
        tokens: torch.Tensor,
        # [num_roots, num_new]
        parents: torch.Tensor,
        # [num_roots, num_new]
        positions: torch.Tensor,
        # [num_roots, 1, num_new, num_columns]
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Read a level. Returns logits, [num_roots, num_new, vocab_size]."""
        out = self._model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = out.past_key_values
        return out.logits

    @torch.inference_mode()
    def read(
        self,
        # [num_roots, num_new]
        tokens: torch.Tensor,
        # [num_roots, num_new]
        parents: torch.Tensor,
    ) -> torch.Tensor:
        """Read the next level's nodes; the first call reads the roots.

        Args:
            tokens: the nodes' tokens; any token where a root has fewer new nodes than others.
            parents: each node's parent, as a column over all earlier calls, counted from 0. Not
                read in the first call.

        Returns:
            The nodes' logits, [num_roots, num_new, vocab_size].
        """
        num_roots, num_new = tokens.shape
        before = self._seen.shape[2]
        seen = self._seen.new_zeros(num_roots, num_new, before + num_new)
        if before:
            index = parents.unsqueeze(2).expand(-1, -1, before)
            seen[:, :, :before] = self._seen.gather(1, index)
        seen[:, :, before:] = torch.eye(num_new, dtype=torch.bool, device=tokens.device)
        wider = self._seen.new_zeros(num_roots, before + num_new, before + num_new)
        wider[:, :before, :before] = self._seen
        wider[:, before:] = seen
        self._seen = wider

        mask = torch.cat([self._text.expand(-1, num_new, -1), seen], dim=2).unsqueeze(1)
        dtype = self._model.dtype
        scores = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        scores.masked_fill_(~mask, torch.finfo(dtype).min)
        positions = (self._position + self._depth).expand(-1, num_new)
        logits = self._read_nodes(tokens, parents, positions, scores)
        self._depth += 1
        return logits


class HeadRows(TreeRows):
    """Reads trees with a head, whose rows stand where the hidden states do that they are fed: those
    of the target up to the root's row, and then the ones that the head gave for the parent.

    Args:
        head: the head.
        target: the target, which reads the texts.
        roots: where the trees begin, behind the first token of their text.
    """

    shift = 1
    _model: "OfflineHead"

    def __init__(self, head: "OfflineHead", target: PreTrainedModel, roots: Roots) -> None:
        self._target = target
        super().__init__(head, roots)

    def _read_texts(self, roots: Roots) -> Cache:
        states = self._model.read_target(self._target, roots.texts)
        # [num_roots, num_columns, hidden_size]: what the head gave for a node; first, what the
        # root's row is fed
        self._given = states[roots.text, roots.position - 1].unsqueeze(1)
        cache = DynamicCache()
        rows = torch.arange(states.shape[1] - 1, device=states.device)
        rows = rows.expand(len(states), -1)
        self._model(roots.texts[:, 1:], states[:, :-1], rows, None, cache)
        return cache

    def _read_nodes(
        self,
        # [num_roots, num_new]
        tokens: torch.Tensor,
        # [num_roots, num_new]
        parents: torch.Tensor,
        # [num_roots, num_new]
        positions: torch.Tensor,
        # [num_roots, 1, num_new, num_columns]
        mask: torch.Tensor,
    ) -> torch.Tensor:
        fed = self._given
        if self._depth > 0:
            fed = fed.gather(1, parents.unsqueeze(2).expand(-1, -1, fed.shape[2]))
        for_logits, feedback = self._model(tokens, fed, positions, mask, self._cache)
        self._given = torch.cat([self._given, feedback], dim=1) if self._depth > 0 else feedback
        return self._model.logits(for_logits)


def draft_rows(pair: ModelPair, roots: Roots) -> TreeRows:
    """What reads the pair's draft below roots."""
    if pair.description.head is None:
        return TreeRows(pair.draft, roots)
    return HeadRows(cast("OfflineHead", pair.draft), pair.target, roots)


def draft_logits(
    pair: ModelPair,
    # [num_tokens] int64
    text: torch.Tensor,
    # [num_below] int64
    path: torch.Tensor,
) -> torch.Tensor:
    """What the draft says after a text and a path below its last token, the root. [vocab_size]"""
    if pair.description.head is None:
        return pair.draft(input_ids=torch.cat([text, path]).unsqueeze(0)).logits[0, -1]
    root = torch.tensor([len(text) - 1], device=text.device)
    rows = draft_rows(pair, Roots(text.unsqueeze(0), torch.zeros_like(root), root))
    logits = rows.read(text[-1:].unsqueeze(0), torch.zeros_like(root).unsqueeze(0))
    for parent, token in enumerate(path):
        logits = rows.read(token.view(1, 1), torch.full_like(root, parent).unsqueeze(0))
    return logits[0, -1]
