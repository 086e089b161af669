# SPDX-License-Identifier: Apache-2.0
"""The built-in rules: one class, which runs the kernels by a row of `triton_kernels.rules`."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from vllm_spechub.rules.base import TreeKernels, VerificationRule, check_children
from vllm_spechub.rules.draft_state import DraftLevel, DraftState
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels.arguments import KeptRows, Requests, TargetRows, VerifiedPaths
from vllm_spechub.triton_kernels.child_sampling import sample_children
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES, builtin_rule
from vllm_spechub.triton_kernels.verification import verify_tree
from vllm_spechub.triton_kernels.verification.reference import reach

PORTABLE_KERNELS = TreeKernels(sample_children, verify_tree, DraftState.write_tokens)
"""Triton for CUDA tensors, plain PyTorch for others."""


class KernelRule(VerificationRule):
    """Any rule of the table, by its name."""

    captures: ClassVar[bool] = True

    def __init__(self, name: str, kernels: TreeKernels, sharpening: float = 1.0) -> None:
        super().__init__(name, kernels, sharpening)
        self.max_children = BUILTIN_RULES[name].max_children

    @classmethod
    def check(cls, name: str, sharpening: float, trees: Sequence[TokenTree] = ()) -> None:
        rule = builtin_rule(name, sharpening, max_children=1)
        for tree in trees:
            check_children(name, tree, rule.max_children)

    def sample_children(
        self,
        logits: torch.Tensor,
        level: DraftLevel,
        requests: Requests,
        state: DraftState,
    ) -> None:
        rows = level.rows(len(requests.req_idx))
        # drawn from what is stored, which is what verification will see
        logits = logits.to(state.drafts.logits.dtype)
        children = self.kernels.sample_children(
            logits,
            rows.nodes,
            rows.num_children,
            requests.rows(rows.req),
            rule=self.name,
            max_children=level.max_children,
            sharpening=self.sharpening,
            keep=KeptRows(state.drafts.logits, rows.internal),
        )
        self.kernels.write_tokens(state, level, requests.req_idx, children)

    def verify(self, target: TargetRows, requests: Requests, state: DraftState) -> VerifiedPaths:
        return self.kernels.verify_tree(
            target,
            state.drafts,
            requests,
            state.tables,
            level_sizes=state.tree.level_sizes,
            rule=self.name,
            sharpening=self.sharpening,
        )

    def reach(self, target: TargetRows, requests: Requests, state: DraftState) -> torch.Tensor:
        return reach(
            target,
            state.drafts,
            requests,
            state.tables,
            rule=self.name,
            sharpening=self.sharpening,
        )
