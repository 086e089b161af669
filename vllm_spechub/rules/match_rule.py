# SPDX-License-Identifier: Apache-2.0
"""`match`: the token that plain decoding draws decides at every node."""

from typing import ClassVar

import torch

from vllm_spechub.rules.draft_state import DraftState
from vllm_spechub.rules.kernel_rule import KernelRule
from vllm_spechub.triton_kernels.arguments import Requests, TargetRows, VerifiedPaths


class MatchRule(KernelRule):
    """Accepts a child if the target itself draws its token.

    A seeded request gets the text that plain decoding gives for its seed, whatever the draft is, up
    to ties in floating point. Without the engine's draws, as in the library, the same distribution
    comes from verification's own coins.
    """

    reads_draws: ClassVar[bool] = True

    def verify(self, target: TargetRows, requests: Requests, state: DraftState) -> VerifiedPaths:
        if target.drawn is None:
            return super().verify(target, requests, state)
        tree, device = state.tree, target.row_start.device
        nodes = torch.arange(tree.num_nodes + 1, device=device)
        # [num_reqs, num_tree_nodes]
        rows = (target.row_start.unsqueeze(1) + nodes).clamp(max=len(target.node_tokens) - 1)
        drawn, tokens = target.drawn[rows], target.node_tokens[rows].long()
        parents = state.tables.of(requests.req_idx.long()).parents.long()
        on_path = (tokens == drawn.gather(1, parents)) & (nodes <= target.num_nodes.unsqueeze(1))
        on_path[:, 0] = True
        path = torch.full((len(rows), tree.depth + 1), -1, dtype=torch.int32, device=device)
        path[:, 0] = 0
        first = 1
        for depth, size in enumerate(tree.level_sizes[1:], start=1):
            level = slice(first, first + size)
            on_path[:, level] &= on_path.gather(1, parents[:, level])
            accepted, place = on_path[:, level].max(dim=1)
            path[:, depth] = torch.where(accepted, first + place, -1)
            first += size
        emitted = drawn.gather(1, path.clamp(min=0).long()).masked_fill_(path < 0, -1)
        return VerifiedPaths(emitted, (path >= 0).sum(dim=1, dtype=torch.int32), path)
