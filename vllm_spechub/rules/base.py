# SPDX-License-Identifier: Apache-2.0
"""Verification rules: how a node's children are drawn, and how a drawn tree is accepted.

The two halves must fit together, so one class holds both. Other packages add rules under the entry
point group `vllm_spechub.rules`; docs/extending.md shows a complete one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch

from vllm_spechub.registry import RULES
from vllm_spechub.rules.draft_state import DraftLevel, DraftState
from vllm_spechub.trees.level_tree import LevelTree
from vllm_spechub.trees.tree import Tree
from vllm_spechub.triton_kernels.arguments import (
    Children,
    Requests,
    TargetRows,
    VerifiedPaths,
)
from vllm_spechub.triton_kernels.constants import MAX_CHILDREN
from vllm_spechub.triton_kernels.rules import check_sharpening

ESTIMATE_REPETITIONS = 64
"""How often a rule without a closed form verifies a tree to estimate its chances."""


class TreeKernels(NamedTuple):
    """One platform's implementations of what rules compute."""

    # as `triton_kernels.child_sampling.sample_children`
    sample_children: Callable[..., Children]
    # as `triton_kernels.verification.verify_tree`
    verify_tree: Callable[..., VerifiedPaths]
    # as `DraftState.write_tokens`, with the state as the first argument
    write_tokens: Callable[..., None]
    # as `triton_kernels.level_allocation.allocate_children`
    allocate_children: Callable[..., None]


class RuleConfig(Protocol):
    """What a configuration says about rules."""

    @property
    def verification(self) -> str: ...

    @property
    def sharpening(self) -> float: ...


class VerificationRule(ABC):
    """A lossless pair: how children are drafted, and how they are accepted.

    What is emitted must have exactly the target's distribution, whatever the draft's is. Random
    draws are functions of (seed, root position, node, purpose), never of a global generator:
    every tensor-parallel rank draws alone and must draw alike.

    Args:
        name: the registered name.
        kernels: what the platform computes with. A rule may use them or not.
        sharpening: the exponent that sampled children are drawn with.
    """

    max_children: int = MAX_CHILDREN
    """Most children of a node."""
    sharpens: ClassVar[bool] = False
    """Whether `sharpening` may be other than 1."""
    follows_levels: ClassVar[bool] = False
    """Whether it drafts a `LevelTree`, of which it decides each level's topology itself, before it
    draws any child."""
    captures: ClassVar[bool] = False
    """Whether `sample_children` only launches work whose arguments are tensors or the same in every
    step, so that a CUDA graph may replay it."""
    reads_draws: ClassVar[bool] = False
    """Whether `verify` reads `target.drawn`, the target's own draws with the engine's noise."""

    def __init__(self, name: str, kernels: TreeKernels, sharpening: float = 1.0) -> None:
        """The drafting side and the verifying side each build one."""
        self.name = name
        self.kernels = kernels
        self.sharpening = sharpening

    @classmethod
    def check(cls, name: str, sharpening: float, trees: Sequence[Tree] = ()) -> None:
        """Refuse what this rule cannot do, before any weights are loaded.

        Args:
            name: the registered name.
            sharpening: as configured.
            trees: those that are to be drafted.

        Raises:
            ValueError: one line that names the option and what is allowed.
        """
        check_sharpening(sharpening)
        if sharpening != 1.0 and not cls.sharpens:
            raise ValueError(f"sharpening must be 1 with rule {name!r}, which does not read it")
        for tree in trees:
            check_children(name, tree, cls.max_children)
            if isinstance(tree, LevelTree) and not cls.follows_levels:
                raise ValueError(
                    f"tree is {tree}, but rule {name!r} drafts static trees only: use another "
                    "tree, or rule 'mixed'"
                )

    @abstractmethod
    def sample_children(
        self,
        # [num_reqs * num_expanded, vocab_size], a request's nodes side by side
        logits: torch.Tensor,
        level: DraftLevel,
        # [num_reqs]
        requests: Requests,
        state: DraftState,
    ) -> None:
        """Draw the children of a level's nodes and store them with `state.write_children`.

        A row's node is in `level.rows(num_reqs).nodes`: noise must depend on it.
        """

    @abstractmethod
    def verify(
        self,
        # a request's rows are in node order, the root's first
        target: TargetRows,
        # [num_reqs]
        requests: Requests,
        state: DraftState,
    ) -> VerifiedPaths:
        """Walk every request's tree and emit tokens with the target's distribution.

        A node of which some child is not among the first `target.num_nodes` is a leaf.
        """

    def reach(
        self,
        target: TargetRows,
        # [num_reqs]
        requests: Requests,
        state: DraftState,
    ) -> torch.Tensor:
        """The probability that `verify` accepts each node, given the drafted trees.

        Simulations need it. It is estimated here by verifying repeatedly, as if at other root
        positions; a rule with a closed form overrides this.

        Returns:
            float32 [num_reqs, num_nodes + 1], 1 for the root.
        """
        counts = torch.zeros(
            len(requests.req_idx), state.tree.num_nodes + 1, device=target.logits.device
        )
        for repetition in range(ESTIMATE_REPETITIONS):
            moved = requests._replace(root_positions=requests.root_positions + repetition)
            path = self.verify(target, moved, state).path
            counts.scatter_add_(1, path.clamp(min=0).long(), (path >= 0).float())
        return counts / ESTIMATE_REPETITIONS


def check_children(name: str, tree: Tree, most: int) -> None:
    """Refuse a tree whose nodes have more children than a rule takes."""
    if tree.max_children > most:
        allowed = "one child" if most == 1 else f"at most {most} children"
        raise ValueError(
            f"tree is {tree}, but rule {name!r} takes {allowed} per node"
            + (": use chain:DEPTH, or another rule" if most == 1 else "")
        )


def build_rule(config: RuleConfig, kernels: TreeKernels) -> VerificationRule:
    """The configured rule."""
    return RULES.load(config.verification)(config.verification, kernels, config.sharpening)


def check_rule(name: str, sharpening: float, trees: Sequence[Tree] = ()) -> None:
    """Refuse a rule that is not registered, or options that it does not take.

    Raises:
        ValueError: one line that names the option and what is allowed.
    """
    if name not in RULES:
        raise ValueError(f"rule is {name!r}, allowed: {', '.join(RULES)}")
    RULES.load(name).check(name, sharpening, trees)
