# SPDX-License-Identifier: Apache-2.0
"""The rules of `triton_kernels.rules`, as the engine uses them: all run one pair of kernels."""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from vllm.platforms import current_platform

from vllm_spechub.rules.base import VerificationRule, VerifiedPaths
from vllm_spechub.rules.draft_state import DraftLevel, DraftState
from vllm_spechub.triton_kernels.rules import SPECHUB

if TYPE_CHECKING:
    from vllm_spechub.config import SpecHubConfig


class Kernels(NamedTuple):
    sample_children: Callable
    verify_tree: Callable
    write_children: Callable


@cache
def kernels() -> Kernels:
    """Compiled by Numba on the CPU, Triton's elsewhere. Imported when a rule first draws, so that
    naming a rule costs no compiler."""
    if current_platform.is_cpu():
        from vllm_spechub.cpu.tree_kernels.sampling import (
            sample_children,
            verify_tree,
            write_children,
        )

        return Kernels(sample_children, verify_tree, write_children)
    from vllm_spechub.triton_kernels.child_sampling import sample_children
    from vllm_spechub.triton_kernels.verification import verify_tree

    return Kernels(sample_children, verify_tree, DraftState.write_children)


class _KernelRule(VerificationRule):
    @classmethod
    def check_config(cls, config: "SpecHubConfig") -> None:
        if config.sharpening != 1.0 and cls.name not in SPECHUB:
            raise ValueError(
                f"speculative_config['sharpening']: verification {cls.name!r} has no sampled slot "
                f"to sharpen, allowed with: {', '.join(SPECHUB)}"
            )

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
        rows = level.rows(len(idx_mapping))
        # drawn from what is stored, which is what verification will see
        logits = logits.to(state.logits.dtype)
        tokens, sample_slots = kernels().sample_children(
            logits,
            temperature,
            seeds,
            idx_mapping[rows.req],
            root_positions[rows.req],
            rows.nodes,
            rows.num_children,
            rule=self.name,
            max_children=level.max_children,
            sharpening=self.config.sharpening,
        )
        kernels().write_children(state, level, idx_mapping, logits, tokens, sample_slots)

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
            *kernels().verify_tree(
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
                state.subtree_sizes,
                max_depth=state.tree.depth,
                rule=self.name,
                sharpening=self.config.sharpening,
            )
        )


class OrderedSpecHub(_KernelRule):
    """Hubs and one sample; the token that is distributed as the draft comes first, which pays when
    the first child has the larger subtree."""

    name = "ordered"


class UnorderedSpecHub(_KernelRule):
    """Hubs by rank, then one sample."""

    name = "unordered"


class TraversalSpecHub(_KernelRule):
    """The children of `ordered`, verified from leaf to root: a node that top-down verification
    never reaches may still be accepted."""

    name = "traversal"


class RecursiveRejection(_KernelRule):
    """Children drawn independently, tried one after the other (SpecInfer)."""

    name = "rrs"


class RecursiveRejectionWithoutReplacement(_KernelRule):
    """Children drawn without replacement, tried one after the other (Sequoia)."""

    name = "rrsw"


class ChainRejection(_KernelRule):
    """Standard rejection sampling down a chain."""

    name = "chain"

    @classmethod
    def check_config(cls, config: "SpecHubConfig") -> None:
        super().check_config(config)
        for tree in config.schedule.trees:
            if tree.num_children.max() > 1:
                raise ValueError(
                    f"speculative_config['tree'] is {tree}, but verification 'chain' takes one "
                    "child per node: use chain:DEPTH, or another verification"
                )
