# SPDX-License-Identifier: Apache-2.0
"""SpecHub (Sun et al., EMNLP 2024, arXiv 2411.05289): hubs and one sample at every node.

A node with k children gets the draft's k - 1 most probable tokens (the hubs) and one token sampled
from the rest. `ordered` puts the token that is distributed as the draft's first, which pays when
the first child has the larger subtree; `unordered` puts the hubs first. One child is an ordinary
sample, accepted by standard rejection.
"""

import torch
from vllm.platforms import current_platform

from vllm_spechub.drafting import DraftLevel, DraftState
from vllm_spechub.rules import VerificationRule, VerifiedPaths

if current_platform.is_cpu():
    from vllm_spechub.host_kernels.tree_sampling import sample_children, verify_tree
else:
    from vllm_spechub.triton_kernels.child_sampling import sample_children
    from vllm_spechub.triton_kernels.verification import verify_tree


class _SpecHub(VerificationRule):
    def sample_children(
        self,
        logits: torch.Tensor,
        level: DraftLevel,
        idx_mapping: torch.Tensor,
        root_positions: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        state: DraftState,
    ) -> None:
        num_reqs, num_expanded = len(idx_mapping), len(level.nodes_np)
        # drawn from what is stored, which is what verification will see
        logits = logits.to(state.logits.dtype)
        tokens, sample_slots = sample_children(
            logits,
            temperature,
            seeds,
            idx_mapping.repeat_interleave(num_expanded),
            root_positions.repeat_interleave(num_expanded),
            level.nodes.repeat(num_reqs),
            level.num_children.repeat(num_reqs),
            rule=self.name,
            max_children=level.max_children,
        )
        state.write_children(level, idx_mapping, logits, tokens, sample_slots)

    def verify(
        self,
        target_logits: torch.Tensor,
        row_start: torch.Tensor,
        num_nodes: torch.Tensor,
        node_tokens: torch.Tensor,
        idx_mapping: torch.Tensor,
        root_positions: torch.Tensor,
        target_temperature: torch.Tensor,
        draft_temperature: torch.Tensor,
        seeds: torch.Tensor,
        state: DraftState,
    ) -> VerifiedPaths:
        return VerifiedPaths(
            *verify_tree(
                target_logits,
                row_start,
                num_nodes,
                node_tokens,
                state.logits,
                state.sample_slots,
                idx_mapping,
                target_temperature,
                draft_temperature,
                seeds,
                root_positions,
                state.first_child,
                state.num_children,
                state.internal_index,
                max_depth=state.tree.depth,
                rule=self.name,
            )
        )


class OrderedSpecHub(_SpecHub):
    name = "ordered"


class UnorderedSpecHub(_SpecHub):
    name = "unordered"
