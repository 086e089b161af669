# SPDX-License-Identifier: Apache-2.0
"""The built-in rules: one class, which runs the kernels by a row of `triton_kernels.rules`."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from vllm_spechub.rules.base import TreeKernels, VerificationRule, check_children
from vllm_spechub.rules.draft_state import DraftLevel, DraftState
from vllm_spechub.trees.level_tree import LevelTree
from vllm_spechub.trees.tree import Tree
from vllm_spechub.triton_kernels.arguments import KeptRows, Requests, TargetRows, VerifiedPaths
from vllm_spechub.triton_kernels.child_sampling import sample_children
from vllm_spechub.triton_kernels.level_allocation import allocate_children
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES, builtin_rule
from vllm_spechub.triton_kernels.verification import verify_tree
from vllm_spechub.triton_kernels.verification.reference import reach

PORTABLE_KERNELS = TreeKernels(
    sample_children, verify_tree, DraftState.write_tokens, allocate_children
)
"""Triton for CUDA tensors, plain PyTorch for others."""


class KernelRule(VerificationRule):
    """Any rule of the table, by its name."""

    follows_levels: ClassVar[bool] = True
    captures: ClassVar[bool] = True

    def __init__(self, name: str, kernels: TreeKernels, sharpening: float = 1.0) -> None:
        super().__init__(name, kernels, sharpening)
        self.max_children = BUILTIN_RULES[name].max_children

    @classmethod
    def check(cls, name: str, sharpening: float, trees: Sequence[Tree] = ()) -> None:
        rule = builtin_rule(name, sharpening, max_children=1)
        for tree in trees:
            check_children(name, tree, rule.max_children)
            if isinstance(tree, LevelTree) and rule.replaces:
                allowed = ", ".join(row.name for row in BUILTIN_RULES.values() if not row.replaces)
                raise ValueError(
                    f"tree is {tree}, but rule {name!r} may draw a token twice, for which level "
                    f"widths are not shown to be lossless; allowed with: {allowed}"
                )

    def sample_children(
        self,
        logits: torch.Tensor,
        level: DraftLevel,
        requests: Requests,
        state: DraftState,
    ) -> None:
        # drawn from what is stored, which is what verification will see
        logits = logits.to(state.drafts.logits.dtype)
        if state.grown is not None:
            self.kernels.allocate_children(
                logits,
                requests,
                state.grown,
                first_node=int(level.nodes_np[0]),
                width=len(level.nodes_np),
                width_below=level.children.stop - level.children.start,
                rule=self.name,
            )
            level = state.with_children(level, requests.req_idx)
        rows = level.rows(len(requests.req_idx))
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
