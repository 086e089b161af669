# SPDX-License-Identifier: Apache-2.0
"""Draft and verify trees without an engine: any two models, batched, on CPU or CUDA tensors.

The functions that run inside the engine do the work; here they get distributions instead of logits,
and a `torch.Generator` instead of request seeds.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from vllm_spechub.registry import RULES
from vllm_spechub.rules.acceptance import check_probs
from vllm_spechub.rules.base import TreeKernels, check_rule
from vllm_spechub.rules.draft_state import DraftState
from vllm_spechub.rules.grown_trees import static_tree
from vllm_spechub.rules.kernel_rule import PORTABLE_KERNELS
from vllm_spechub.trees.level_tree import LevelTree
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels.arguments import Drafts, GrownTrees, Requests, TargetRows
from vllm_spechub.triton_kernels.rules import DEFAULT_RULE
from vllm_spechub.triton_kernels.verification import reference

DraftProbs = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class DraftTree:
    """Drafted trees of one shape or of the same level widths, and all that verification needs of
    how they were drafted."""

    tree: TokenTree | LevelTree
    rule: str
    sharpening: float
    # [batch_size, num_nodes] int64: drafted nodes in the tree's order, the root not among them
    tokens: torch.Tensor
    # [batch_size, num_internal, vocab_size] float32: logarithms of the distribution that a node's
    # children were drafted from, for the nodes that have children, in the tree's order
    logits: torch.Tensor
    # [batch_size, num_internal] int32: of each node, bit s for a child in slot s that was drawn
    sampled: torch.Tensor
    # the topology of each sequence's tree, if `tree` is a `LevelTree`
    grown: GrownTrees | None = None

    def tree_of(self, sequence: int) -> TokenTree:
        """The tree that was drafted for a sequence of the batch."""
        if self.grown is not None:
            return static_tree(self.grown, sequence)
        assert isinstance(self.tree, TokenTree)
        return self.tree

    @property
    def batch_size(self) -> int:
        return self.tokens.shape[0]

    @property
    def vocab_size(self) -> int:
        return self.logits.shape[2]


def draft_tree(
    tree: TokenTree | LevelTree,
    draft_probs_fn: DraftProbs,
    batch_size: int,
    *,
    rule: str = DEFAULT_RULE,
    generator: torch.Generator | None = None,
    sharpening: float = 1.0,
) -> DraftTree:
    """Draft a tree of tokens for every sequence of a batch.

    Args:
        tree: the shape, or the widths of the levels of trees that each sequence decides.
        draft_probs_fn: from `prefixes`, int64 [batch_size, t], to the draft's distribution after
            them, [batch_size, vocab_size], any float dtype. `prefixes` are the drafted tokens on
            the path from the root to a node, so t = 0 at the root and t = 1 below it. It is called
            once for every node that may have children, in the tree's order; the first call's
            `prefixes` are on the generator's device (the CPU without one), later calls' on its
            result's.
        batch_size: the number of sequences.
        rule: the registered rule that drafts the children; `verify_tree` uses the same rule.
        generator: where the noise comes from; PyTorch's default generator if None. Every call
            takes one 64-bit seed for each sequence from it, and all draws are functions of that
            seed, the node and their purpose, so equal generator states give equal trees.
        sharpening: the power to which the draft's distribution is raised where a rule samples a
            child; rules without a sampled child accept 1 only.

    Returns:
        The drafted trees.

    Raises:
        ValueError: names the argument: an unknown rule, a tree that the rule cannot draft, rows of
            `draft_probs_fn` that are misshapen, not finite, negative or do not sum to 1.

    Examples::

        >>> tree = TokenTree.complete(branching=2, depth=3)
        >>> q = torch.tensor([[0.6, 0.3, 0.1]])
        >>> draft = draft_tree(tree, lambda prefixes: q.expand(len(prefixes), -1), batch_size=5)
        >>> tuple(draft.tokens.shape)
        (5, 14)
    """
    if not isinstance(tree, TokenTree | LevelTree):
        raise ValueError(f"tree must be a TokenTree or a LevelTree, got {type(tree).__name__}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer from 1, got {batch_size!r}")
    check_rule(rule, sharpening, [tree])
    verification = RULES.load(rule)(rule, PORTABLE_KERNELS, sharpening)
    device = generator.device if generator is not None else torch.device("cpu")
    seeds = _seeds(batch_size, generator)
    root = torch.empty(batch_size, 0, dtype=torch.int64, device=device)
    logits = _draft_logits(tree, 0, draft_probs_fn, root, None)
    device, vocab_size = logits.device, logits.shape[1]
    state = DraftState.empty(tree, batch_size, vocab_size, torch.float32, device)
    everyone = torch.arange(batch_size, device=device)
    ones = torch.ones(batch_size, device=device)
    requests = Requests(everyone, torch.zeros_like(everyone), ones, seeds.to(device))
    for depth in range(tree.depth):
        level = state.level(depth, everyone)
        if depth:
            parents, rows = state.tables.of(everyone).parents.long(), []
            for node in level.nodes_np.tolist():
                # from the node up to the child of the root, then turned around
                path = [torch.full_like(everyone, node).unsqueeze(1)]
                for _ in range(depth - 1):
                    path.append(parents.gather(1, path[-1]))
                prefixes = state.tokens.gather(1, torch.cat(path[::-1], dim=1) - 1)
                rows.append(_draft_logits(tree, node, draft_probs_fn, prefixes, vocab_size))
            logits = torch.stack(rows, dim=1).flatten(0, 1)
        verification.sample_children(logits, level, requests, state)
    return DraftTree(tree, rule, sharpening, state.tokens, *state.drafts, state.grown)


def verify_tree(
    draft: DraftTree,
    # [batch_size, num_nodes + 1, vocab_size]
    target_probs: torch.Tensor,
    *,
    rule: str | None = None,
    generator: torch.Generator | None = None,
    backend: Literal["torch", "triton"] = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accept a path of every drafted tree and emit one more token, with the target's distribution.

    Args:
        draft: from `draft_tree`.
        target_probs: the target's distribution after every node, row 0 the root's and row i that
            of drafted node i; any float dtype.
        rule: the rule that `draft` was drafted by, which is also the default.
        generator: where the noise comes from; see `draft_tree`. It may be in the state that
            drafting began with: drafting and verification never share noise.
        backend: "torch" runs anywhere; "triton" runs the kernels, on CUDA tensors, or on CPU
            tensors under TRITON_INTERPRET=1. Rules of other packages choose their own.

    Returns:
        tokens: int64 [batch_size, depth + 1], the accepted tokens and then the residual or bonus
            token; -1 after it.
        num_tokens: int64 [batch_size], accepted tokens plus one.

    Raises:
        ValueError: names the argument: a rule that `draft` was not drafted by, rows that are
            misshapen, not finite, negative or do not sum to 1, or a backend that cannot run.

    Examples::

        >>> tree = TokenTree.chain(2)
        >>> q = torch.tensor([[0.5, 0.5]])
        >>> draft = draft_tree(tree, lambda prefixes: q.expand(len(prefixes), -1), 4, rule="chain")
        >>> tokens, num_tokens = verify_tree(draft, q.expand(4, 3, 2), rule="chain")
        >>> num_tokens.tolist()  # the draft is the target: all is accepted
        [3, 3, 3, 3]
    """
    if not isinstance(draft, DraftTree):
        raise ValueError(f"draft must be a DraftTree, got {type(draft).__name__}")
    rule = draft.rule if rule is None else rule
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}, allowed: {', '.join(RULES)}")
    if rule != draft.rule:
        raise ValueError(f"rule is {rule!r}, but draft was drafted by {draft.rule!r}")
    tree, device = draft.tree, draft.tokens.device
    num_rows = tree.num_nodes + 1
    check_probs("target_probs", target_probs, (draft.batch_size, num_rows, draft.vocab_size))
    if target_probs.device != device:
        raise ValueError(f"target_probs is on {target_probs.device}, draft on {device}")
    verification = RULES.load(rule)(rule, _kernels(backend, device), draft.sharpening)

    everyone = torch.arange(draft.batch_size, device=device)
    ones = torch.ones(draft.batch_size, device=device)
    # The rows of one tree after the other; the root's own token is not read.
    node_tokens = torch.cat([draft.tokens.new_zeros(draft.batch_size, 1), draft.tokens], dim=1)
    target = TargetRows(
        _log(target_probs).flatten(0, 1),
        ones,
        (everyone * num_rows).to(torch.int32),
        torch.full_like(everyone, tree.num_nodes, dtype=torch.int32),
        node_tokens.flatten(),
    )
    seeds = _seeds(draft.batch_size, generator).to(device)
    requests = Requests(everyone, torch.zeros_like(everyone), ones, seeds)
    drafts = Drafts(draft.logits, draft.sampled)
    state = DraftState(tree, draft.tokens, drafts, grown=draft.grown)
    paths = verification.verify(target, requests, state)
    return paths.tokens, paths.num_emitted.long()


def _draft_logits(
    tree: TokenTree | LevelTree,
    node: int,
    draft_probs_fn: DraftProbs,
    # [batch_size, depth of the node]
    prefixes: torch.Tensor,
    vocab_size: int | None,
) -> torch.Tensor:
    """The draft's checked distribution at a node, as logarithms. [batch_size, vocab_size]"""
    batch_size, most = len(prefixes), tree.max_children
    probs = draft_probs_fn(prefixes)
    shape = (batch_size, vocab_size) if vocab_size is not None else None
    check_probs("draft_probs_fn's result", probs, shape)
    if probs.dim() != 2 or len(probs) != batch_size or probs.shape[1] < most:
        raise ValueError(
            f"draft_probs_fn's result must be [{batch_size}, vocab_size] with at least {most} "
            f"tokens, not {list(probs.shape)}"
        )
    return _log(probs)


def _log(probs: torch.Tensor) -> torch.Tensor:
    """float32 logarithms, -inf where a probability is 0. Contiguous."""
    wide = probs if probs.dtype == torch.float64 else probs.float()
    return wide.log().float().contiguous()


def _seeds(batch_size: int, generator: torch.Generator | None) -> torch.Tensor:
    """One 64-bit seed for each sequence. [batch_size] int64"""
    limits = torch.iinfo(torch.int64)
    return torch.randint(
        limits.min,
        limits.max,
        (batch_size,),
        generator=generator,
        device=generator.device if generator is not None else None,
    )


def _kernels(backend: str, device: torch.device) -> TreeKernels:
    """The kernels of a backend, checked to run on a device."""
    if backend == "torch":
        return PORTABLE_KERNELS._replace(verify_tree=reference.verify_tree)
    if backend != "triton":
        raise ValueError(f"backend must be 'torch' or 'triton', got {backend!r}")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend 'triton' needs CUDA tensors, or TRITON_INTERPRET=1 on the CPU; draft is on "
            f"{device}, use backend='torch'"
        )
    try:
        from vllm_spechub.triton_kernels.verification import kernel
    except ImportError as error:
        raise ValueError(f"backend 'triton' cannot be imported: {error}") from error
    return PORTABLE_KERNELS._replace(verify_tree=kernel.verify_tree)
