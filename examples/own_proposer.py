# SPDX-License-Identifier: Apache-2.0
"""A proposer of your own, which needs no model and which docs/extending.md explains.

    pip install ./examples
    vllm serve TARGET --speculative-config \
        '{"method": "spechub", "proposer": "bigrams", "tree": "binary:3"}'
"""

import torch

from vllm_spechub.proposers.base import TreeProposer


class BigramProposer(TreeProposer[None]):
    """Drafts by the counts of token pairs in the request's own text."""

    vllm_method = "ngram_gpu"
    needs_model = False
    options = frozenset({"bigram_smoothing"})

    @classmethod
    def check_options(cls, options, target_model_config):
        super().check_options(options, target_model_config)
        smoothing = options.get("bigram_smoothing", 1e-3)
        if not isinstance(smoothing, float) or smoothing <= 0:
            raise ValueError(
                f"speculative_config['bigram_smoothing'] is {smoothing!r}, "
                "allowed: a number above 0"
            )

    def read(self, step):
        """Nothing to prepare: vLLM itself keeps the text up to date."""

    def level_logits(self, step, depth, level, state, carried):
        # [num_reqs, max_model_len] the texts, and which pairs of neighbours both belong to them
        texts = self.req_states.all_token_ids.gpu[step.batch.idx_mapping].long()
        places = torch.arange(1, self.max_model_len, device=texts.device)
        in_text = places <= step.root_positions.unsqueeze(1)
        # [num_rows] each node's own token, and its request
        tokens = self.node_tokens(step, depth, level, state)
        req = level.rows(step.num_reqs).req
        # [num_rows, max_model_len - 1]
        pairs = in_text[req] & (texts[req, :-1] == tokens.unsqueeze(1))
        counts = torch.full(
            (len(tokens), self.vocab_size),
            self.config.proposer_options.get("bigram_smoothing", 1e-3),
            device=texts.device,
        )
        counts.scatter_add_(1, texts[req, 1:], pairs.float())
        return counts.log(), None
