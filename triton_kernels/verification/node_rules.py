# SPDX-License-Identifier: Apache-2.0
"""The mathematics of one node, in plain PyTorch and in the dtype of the arguments.

`draft_distribution` recovers what a node's children were drafted from, `node_outcome` says what
verification from root to leaf does with them, `traversal_outcome` what it does from leaf to root.
All of them are probabilities: nothing here draws.
"""

from typing import NamedTuple

import torch

from ..constants import LOWEST
from ..rules import BUILTIN_RULES


class SpecHubDistribution(NamedTuple):
    """What children are drafted from by rules with one sample."""

    # [num_rows, vocab_size]: distribution of the sampled child, 0 at the hubs
    sample_probs: torch.Tensor
    # [num_rows, max_children]: probability that each hub is the main child, 0 in other slots
    hub_probs: torch.Tensor
    # [num_rows]: probability that the sampled child is the main child
    off_hub_mass: torch.Tensor


class RecursiveDistribution(NamedTuple):
    """What children are drafted from by recursive rules."""

    # [num_rows, max_children, vocab_size]: of each slot's child, given the slots before it
    slot_probs: torch.Tensor


class NodeOutcome(NamedTuple):
    """Weights of what happens at a node; a row's weights sum to 1 up to rounding."""

    # [num_rows, max_children]: probability of accepting each slot's child
    accept: torch.Tensor
    # [num_rows]: probability of accepting none
    reject: torch.Tensor
    # [num_rows, vocab_size]: unnormalised distribution of the token emitted on rejection
    residual: torch.Tensor


class TraversalOutcome(NamedTuple):
    """What leaf-to-root verification does at a node: children are visited one after the other, the
    sampled child first, then by slot; those that fail leave the rest."""

    # [num_rows, max_children]: path acceptance that each child is visited with
    visit: torch.Tensor
    # [num_rows]: probability of accepting the node itself once its children have failed
    leave: torch.Tensor
    # [num_rows, vocab_size]: unnormalised distribution of the token emitted then
    residual: torch.Tensor


def draft_distribution(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    # [num_rows]
    temperature: torch.Tensor,
    # [num_rows, max_children]
    children: torch.Tensor,
    # [num_rows]
    sample_slot: torch.Tensor,
    *,
    rule: str,
    sharpening: float = 1.0,
) -> SpecHubDistribution | RecursiveDistribution:
    """Recover the draft distribution of nodes from the logits and the tokens that were drafted.

    Args:
        logits: float32 or float64; -inf for masked tokens.
        temperature: of the logits' dtype; 0 for a greedy draft.
        children: int64 tokens, -1 past a node's last child.
        sample_slot: int64, slot of the sampled child; not read for recursive rules.
        rule: a built-in rule's name.
        sharpening: the exponent that the sampled child was drawn with.
    """
    # [num_rows, 1]
    greedy = (temperature == 0).unsqueeze(1)
    scale = 1.0 / torch.where(greedy, 1.0, temperature.unsqueeze(1))
    # A row without any possible token was drafted as a greedy one.
    greedy = greedy | (logits.amax(dim=1, keepdim=True) <= LOWEST)
    traits = BUILTIN_RULES[rule]
    if traits.is_recursive:
        return _recursive_distribution(logits, scale, greedy, children, traits.replaces)
    return _spechub_distribution(
        logits, scale, greedy, children, sample_slot.unsqueeze(1), sharpening
    )


def _recursive_distribution(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    # [num_rows, 1]
    scale: torch.Tensor,
    # [num_rows, 1]
    greedy: torch.Tensor,
    # [num_rows, max_children]
    children: torch.Tensor,
    replaces: bool,
) -> RecursiveDistribution:
    """Point masses where drafting had no choice: for greedy rows, and past q's support.

    Without replacement each slot has a softmax of its own over what is left, so a confident draft
    loses no precision after its first child.
    """
    distributions = []
    for child in children.clamp(min=0).split(1, dim=1):
        peak = logits.amax(dim=1, keepdim=True).clamp(min=LOWEST)
        certain = greedy | (peak == LOWEST)
        weight = torch.exp((logits - peak) * scale).masked_fill_(certain, 0.0)
        weight.scatter_add_(1, child, certain.to(weight.dtype))
        distributions.append(weight.div_(weight.sum(dim=1, keepdim=True)))
        if not replaces:
            logits = logits.scatter(1, child, -torch.inf)
    return RecursiveDistribution(torch.stack(distributions, dim=1))


def _hub_index(
    # [num_rows, max_children]
    children: torch.Tensor,
    # [num_rows, 1]
    slot: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sampled child [num_rows, 1], which slots hold hubs, and an index to scatter at: the
    sampled child where no hub is."""
    sample = children.gather(1, slot)
    is_hub = (children >= 0).scatter_(1, slot, False)
    return sample, is_hub, torch.where(is_hub, children, sample)


def _spechub_distribution(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    # [num_rows, 1]
    scale: torch.Tensor,
    # [num_rows, 1]
    greedy: torch.Tensor,
    # [num_rows, max_children]
    children: torch.Tensor,
    # [num_rows, 1]
    slot: torch.Tensor,
    sharpening: float,
) -> SpecHubDistribution:
    """The hubs are the children outside the sampled slot, never recomputed: a tie broken the other
    way would verify against a distribution that nothing was drafted from. Off the hubs is a
    softmax of its own, so a confident draft, whose mass there rounds to nothing, loses no
    precision."""
    sample, is_hub, index = _hub_index(children, slot)

    # Off the hubs. Where nothing is left there, and for a greedy draft, a point mass.
    hub_logits = logits.gather(1, index).masked_fill_(~is_hub, -torch.inf)
    kept = torch.where(is_hub, -torch.inf, logits.gather(1, index))
    off_hub = logits.scatter(1, index, kept)
    off_hub_peak = off_hub.amax(dim=1, keepdim=True).clamp(min=LOWEST)
    certain = greedy | (off_hub_peak == LOWEST)
    off_hub.sub_(off_hub_peak)
    weight = torch.exp(off_hub * (scale * sharpening)).masked_fill_(certain, 0.0)
    weight.scatter_add_(1, sample, certain.to(weight.dtype))
    weight.div_(weight.sum(dim=1, keepdim=True))

    # The masses on and off the hubs, neither computed as 1 minus the other.
    peak = torch.maximum(hub_logits.amax(dim=1, keepdim=True), off_hub_peak)
    hub_weight = torch.exp((hub_logits - peak) * scale)
    off_hub_weight = torch.exp(off_hub.mul_(scale)).sum(dim=1, keepdim=True)
    off_hub_weight.mul_(torch.exp((off_hub_peak - peak) * scale)).masked_fill_(certain, 0.0)
    # A greedy draft's distribution is a point mass on the first child.
    hub_weight.masked_fill_(greedy, 0.0)[:, :1].masked_fill_(greedy & is_hub[:, :1], 1.0)
    # Without hubs all the mass is off them.
    off_hub_weight.masked_fill_(~is_hub.any(dim=1, keepdim=True), 1.0)
    mass = hub_weight.sum(dim=1, keepdim=True) + off_hub_weight
    return SpecHubDistribution(weight, hub_weight / mass, (off_hub_weight / mass).squeeze(1))


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """min(1, numerator / denominator), and 0 for 0 / 0: what has no mass is not accepted."""
    enough = numerator >= denominator
    return torch.where(
        enough, (numerator > 0).to(numerator.dtype), numerator / denominator.masked_fill(enough, 1)
    )


def node_outcome(
    # [num_rows, vocab_size]
    target_probs: torch.Tensor,
    distribution: SpecHubDistribution | RecursiveDistribution,
    # [num_rows, max_children]
    children: torch.Tensor,
    # [num_rows]
    sample_slot: torch.Tensor,
    *,
    rule: str,
) -> NodeOutcome:
    """What verification does at nodes with children, as probabilities given the draft.

    The emitted token, accepted or residual, follows `target_probs` exactly. `_SpecHubParts` and
    `_recursive_outcome` have the formulas; `chain` is SpecHub without hubs, and what `traversal`
    does at a node whose children are leaves, visited with path acceptance 1, is `ordered`.

    Args:
        target_probs: float32 or float64, p.
        distribution: of the same dtype, from `draft_distribution`.
        children: int64 tokens, -1 past a node's last child.
        sample_slot: int64, slot of the sampled child; not read for recursive rules.
        rule: the rule that children were drafted for.
    """
    if isinstance(distribution, RecursiveDistribution):
        return _recursive_outcome(target_probs, distribution.slot_probs, children)
    slot = sample_slot.unsqueeze(1)
    ordered = BUILTIN_RULES[rule].ordered_slots
    parts = _spechub_parts(target_probs, distribution, children, slot, ordered)
    failed = 1.0 - parts.accept_sample
    pool = failed * (1.0 - parts.accept_main)
    pool_mass = parts.hub_gain.sum(dim=1, keepdim=True) + parts.residual_mass
    # A pool without mass is reached by rounding only: accept the sampled child. If the target rules
    # that token out, emit from the target instead.
    stuck = pool_mass <= 0
    possible = parts.sample_target > 0
    pool_scale = pool / pool_mass.masked_fill(stuck, 1.0)
    accept = parts.hub_gain * pool_scale
    accept[:, :1] += failed * parts.accept_main
    accept.scatter_(1, slot, parts.accept_sample + pool.masked_fill(~(stuck & possible), 0.0))
    reject = torch.where(stuck & ~possible, pool, parts.residual_mass * pool_scale)
    residual = torch.where(stuck, target_probs, parts.residual)
    return NodeOutcome(accept, reject.squeeze(1), residual)


class _SpecHubParts(NamedTuple):
    """SpecHub at a node that is to emit the masses T, at most 1 in all.

    With q the draft, H the hubs, Z = q off H, w the distribution of the sampled child x, 0 on H:

    Unordered: accept x with min(1, T_x / w_x), else pool. The pool, whose mass is T(H) + sum off H
    of (T - w)+ plus whatever T lacks to 1, holds T_h on H and (T - w)+ off H.

    Ordered, with B = sum off H of ((1 - Z) w - (T - Z w)+)+ and l_h = B q_h / (1 - Z): where x is
    in slot 0, accept it with min(1, T_x / (Z w_x)). Otherwise accept x with
    min(1, (T_x - Z w_x)+ / ((1 - Z) w_x)), else the hub h in slot 0 with min(1, T_h / l_h).
    Whatever fails goes to the pool, which holds (T_h - l_h)+ on H and (T - w)+ off H.

    Either way all of T is emitted, and T(H) + sum off H of min(T, w) by accepting a child, which no
    rule for this draft exceeds. Source: SpecHub (Sun et al., EMNLP 2024, arXiv 2411.05289); several
    hubs, ordered slots and any w were derived for this project.
    """

    # [num_rows, 1] each: probability of accepting x, and the hub in slot 0 if x was not
    accept_sample: torch.Tensor
    accept_main: torch.Tensor
    # [num_rows, max_children]: the pool's mass of each hub
    hub_gain: torch.Tensor
    # [num_rows, 1]: the pool's mass off the hubs
    residual_mass: torch.Tensor
    # [num_rows, vocab_size]: that mass by token
    residual: torch.Tensor
    # [num_rows, 1]: T_x
    sample_target: torch.Tensor


def _spechub_parts(
    # [num_rows, vocab_size]
    target: torch.Tensor,
    distribution: SpecHubDistribution,
    # [num_rows, max_children]
    children: torch.Tensor,
    # [num_rows, 1]
    slot: torch.Tensor,
    ordered: bool,
) -> _SpecHubParts:
    sample, is_hub, index = _hub_index(children, slot)
    sample_target = target.gather(1, sample)
    sample_draft = distribution.sample_probs.gather(1, sample)
    hub_target = target.gather(1, index).masked_fill_(~is_hub, 0.0)

    residual = (target - distribution.sample_probs).clamp_(min=0)
    residual.scatter_(1, index, residual.gather(1, index).masked_fill_(is_hub, 0.0))
    residual_mass = residual.sum(dim=1, keepdim=True)
    if not ordered:
        accept_sample = _ratio(sample_target, sample_draft)
        accept_main = torch.zeros_like(accept_sample)
        return _SpecHubParts(
            accept_sample, accept_main, hub_target, residual_mass, residual, sample_target
        )
    off_hub_mass = distribution.off_hub_mass.unsqueeze(1)
    hub_mass = distribution.hub_probs.sum(dim=1, keepdim=True)
    # What T leaves of w to be matched by the hubs: B. Hubs add nothing, as w is 0 there.
    claimed = (target - off_hub_mass * distribution.sample_probs).clamp_(min=0)
    unclaimed = (hub_mass * distribution.sample_probs).sub_(claimed).clamp_(min=0)
    unclaimed = unclaimed.sum(dim=1, keepdim=True)
    share = unclaimed * distribution.hub_probs / hub_mass.masked_fill(hub_mass == 0, 1.0)
    excess = sample_target - off_hub_mass * sample_draft
    accept_sample = torch.where(
        slot == 0,
        _ratio(sample_target, off_hub_mass * sample_draft),
        _ratio(excess.clamp_(min=0), hub_mass * sample_draft),
    )
    accept_main = _ratio(hub_target[:, :1], share[:, :1])
    hub_gain = (hub_target - share).clamp_(min=0)
    return _SpecHubParts(
        accept_sample, accept_main, hub_gain, residual_mass, residual, sample_target
    )


def traversal_outcome(
    # [num_rows, vocab_size]
    target_probs: torch.Tensor,
    distribution: SpecHubDistribution,
    # [num_rows, max_children]
    children: torch.Tensor,
    # [num_rows]
    sample_slot: torch.Tensor,
    # [num_rows]
    path_acceptance: torch.Tensor,
    *,
    ordered: bool,
) -> TraversalOutcome:
    """What leaf-to-root verification does at nodes that are visited with path acceptance a.

    The node is to emit the masses T = a p, as `_SpecHubParts` has it. A child is accepted not on
    the spot but, by its own subtree, with exactly the probability that it is visited with.
    In the pool, whose mass is 1 - a plus all that it holds, each hub takes its mass in turn; a hub
    that fails leaves the pool. Last the node itself is accepted with the off-hub mass over what is
    then left, and emits from (a p - w)+ off the hubs. Source: traversal verification (Weng et al.,
    arXiv 2505.12398), whose step is the case without hubs; with SpecHub it is this project's.

    Args:
        target_probs: float32 or float64, p.
        distribution: of the same dtype, from `draft_distribution`.
        children: int64 tokens, -1 past a node's last child.
        sample_slot: int64, slot of the sampled child.
        path_acceptance: of the same dtype, a, 0 to 1.
        ordered: which way the node emits T. Both are lossless for the slots of `traversal`: ordered
            favours slot 0, the other way spreads the chances, so that more of the failures below
            are made good. `verify_tree` takes the latter where all children's subtrees have one
            size.
    """
    slot = sample_slot.unsqueeze(1)
    acceptance = path_acceptance.unsqueeze(1)
    parts = _spechub_parts(acceptance * target_probs, distribution, children, slot, ordered)
    lacking = 1.0 - acceptance
    # The pool's mass when each hub's turn comes, summed from the end: nothing cancels.
    rest = parts.residual_mass + lacking
    left = parts.hub_gain.flip(1).cumsum(dim=1).flip(1) + rest
    visit = parts.hub_gain / left.masked_fill(left == 0, 1.0)
    # The hub in slot 0 has its turn before the pool, which holds none of it if that fails.
    if ordered:
        visit[:, :1] = parts.accept_main
    visit.scatter_(1, slot, parts.accept_sample)
    # A pool without mass is reached by rounding only, and then with a = 1: emit from the target.
    stuck = parts.residual_mass <= 0
    leave = torch.where(stuck, acceptance == 1, parts.residual_mass / rest.masked_fill(stuck, 1.0))
    residual = torch.where(stuck, target_probs, parts.residual)
    return TraversalOutcome(visit, leave.squeeze(1), residual)


def _recursive_outcome(
    # [num_rows, vocab_size]
    target_probs: torch.Tensor,
    # [num_rows, max_children, vocab_size]
    slot_probs: torch.Tensor,
    # [num_rows, max_children]
    children: torch.Tensor,
) -> NodeOutcome:
    """Recursive rejection: with r = p at first, accept each slot's child x ~ q with
    min(1, r_x / q_x), or else go on with r = norm((r - q)+). A token drawn twice has r = 0 the
    second time. Source: SpecInfer (Miao et al., ASPLOS 2024, arXiv 2305.09781) and Sequoia (Chen et
    al., NeurIPS 2024, arXiv 2402.12374)."""
    residual = target_probs
    reach = torch.ones_like(target_probs[:, :1])
    accept = []
    for slot, child in enumerate(children.split(1, dim=1)):
        present = child >= 0
        distribution, child = slot_probs[:, slot], child.clamp(min=0)
        left = (residual - distribution).clamp_(min=0)
        mass = left.sum(dim=1, keepdim=True)
        # A residual without mass is reached by rounding only: accept the child. If the residual
        # rules that token out, go on as if it had not been tried.
        stuck = mass <= 0
        target = residual.gather(1, child)
        chance = torch.where(
            stuck, (target > 0).to(target.dtype), _ratio(target, distribution.gather(1, child))
        ).masked_fill_(~present, 0.0)
        accept.append(reach * chance)
        reach = reach * (1.0 - chance)
        left.div_(mass.masked_fill(stuck, 1.0))
        residual = torch.where(present & ~stuck, left, residual)
    return NodeOutcome(torch.cat(accept, dim=1), reach.squeeze(1), residual)
