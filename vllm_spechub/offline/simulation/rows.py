# SPDX-License-Identifier: Apache-2.0
"""A model's distributions at tree nodes below roots in the middle of texts."""

import torch
from transformers import PreTrainedModel

from vllm_spechub.offline.simulation.texts import Roots


class TreeRows:
    """Reads trees level by level: one forward pass per level, for all roots at once.

    Every root has a row of the batch, with its text's keys and values in the cache. Nodes (here the
    root is one, too) see the text before their root and their ancestors, by a four-dimensional
    attention mask; their position is the root's plus their depth.

    Args:
        model: the model that reads.
        roots: where the trees begin.
    """

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, roots: Roots) -> None:
        self._model = model
        self._position = roots.position
        length = roots.texts.shape[1]
        out = model(input_ids=roots.texts, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        self._cache.batch_select_indices(roots.text)
        # [num_roots, 1, length]: the text before the root
        text = torch.arange(length, device=roots.texts.device)
        self._text = (text < roots.position.unsqueeze(1)).unsqueeze(1)
        # [num_roots, num_columns, num_columns]: which columns a column sees
        self._seen = torch.zeros(len(roots.text), 0, 0, dtype=torch.bool, device=text.device)
        self._depth = 0

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
        position = (self._position + self._depth).unsqueeze(1).expand(-1, num_new)
        out = self._model(
            input_ids=tokens,
            attention_mask=torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
                ~mask, torch.finfo(dtype).min
            ),
            position_ids=position,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = out.past_key_values
        self._depth += 1
        return out.logits
