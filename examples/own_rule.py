# SPDX-License-Identifier: Apache-2.0
"""A verification rule of your own, which docs/extending.md explains.

    pip install ./examples
    vllm serve TARGET --speculative-config \
        '{"method": "spechub", "model": "DRAFT", "verification": "target_draw"}'
"""

import torch

from vllm_spechub.rules.base import VerificationRule
from vllm_spechub.triton_kernels import rng
from vllm_spechub.triton_kernels.arguments import Children, VerifiedPaths


class TargetDraw(VerificationRule):
    """Accepts a child if the target itself draws it. Of the draft, only its tokens are read."""

    def sample_children(self, logits, level, requests, state):
        rows = level.rows(len(requests.req_idx))
        # [num_rows, max_children]
        tokens = logits.topk(level.max_children, dim=1).indices
        slots = torch.arange(level.max_children, device=logits.device)
        tokens = tokens.masked_fill(slots >= rows.num_children.unsqueeze(1), -1)
        children = Children(tokens, sampled=torch.zeros_like(rows.num_children))  # none was drawn
        state.write_children(level, requests.req_idx, logits, children)

    def verify(self, target, requests, state):
        num_reqs, width = len(requests.req_idx), state.tree.depth + 1
        device = target.logits.device
        seeds = requests.seeds[requests.req_idx]
        # [num_reqs, 1]
        temperature = target.temperature[requests.req_idx].unsqueeze(1)
        tokens = torch.full((num_reqs, width), -1, device=device)
        path = torch.full((num_reqs, width), -1, dtype=torch.int32, device=device)
        slots = torch.arange(self.max_children, device=device)
        # [num_reqs] each
        node = torch.zeros(num_reqs, dtype=torch.int64, device=device)
        walking = torch.ones(num_reqs, dtype=torch.bool, device=device)
        for depth in range(width):
            logits = target.logits[target.row_start + node].float()
            probs = torch.softmax(logits / torch.where(temperature > 0, temperature, 1.0), dim=1)
            key = rng.row_key(seeds, requests.root_positions, node, rng.RESIDUAL)
            drawn = torch.where(temperature[:, 0] > 0, rng.draw(probs, key), logits.argmax(dim=1))
            tokens[:, depth] = torch.where(walking, drawn, -1)
            path[:, depth] = torch.where(walking, node, -1)

            first, count = state.tables.first_child[node], state.tables.num_children[node]
            # a node that lost a child to a budget is a leaf
            inner = (count > 0) & (first + count - 1 <= target.num_nodes)
            rows = (target.row_start + first).unsqueeze(1) + slots
            children = target.node_tokens[rows.clamp(max=len(target.node_tokens) - 1)]
            hit = (children == drawn.unsqueeze(1)) & (slots < count.unsqueeze(1))
            walking = walking & inner & hit.any(dim=1)
            node = torch.where(walking, first + hit.long().argmax(dim=1), node)
        return VerifiedPaths(tokens, (path >= 0).sum(dim=1, dtype=torch.int32), path)
