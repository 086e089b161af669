# SPDX-License-Identifier: Apache-2.0
"""One node of a tree, in plain PyTorch: the loop that all verification rules share.

A node's children stand in slots. A *sample* was drawn from a distribution that is known given the
samples before it; a *hub* was chosen without chance, so that its distribution is a point mass.
Verification visits the samples in slot order, then the hubs in slot order. With T_j what is still
to be emitted and l_j the distribution of slot j, it accepts the child x with `min(1, T_j(x) /
l_j(x))` and hands `(T_j - l_j)+`, renormalised, on to the next child.

No T_j is stored. Let a be the node's path acceptance (the probability with which the node itself
has to be accepted), p the target, q the draft, and l_j = q off the hubs and off the samples before
j, renormalised, which is `exp(z - LSE_j)` for draft logits z. Unrolled, two scalars describe T_j:

    T_j(t) = (a p(t) - kappa_j l_j(t))+ / F_j   off the hubs, 0 for samples that failed
    T_j(h) = a p(h) / F_j                       on hubs that were not visited, 0 on the others
    kappa_j = F_{j-1} + kappa_{j-1} exp(LSE_j - LSE_{j-1})
    F_j = (1 - a) + a p(hubs not visited) + R_j,   R_j = sum over t of (a p(t) - kappa_j l_j(t))+

The exponent is never positive and F_j adds terms that are not negative, so nothing overflows or
cancels, however confident the draft is.

With the path acceptance carried down, from leaf to root, this is traversal verification (Weng et
al., 2025, arXiv 2505.12398), for one child block verification (Sun et al., 2024, arXiv 2403.10444).
With a = 1 at every node, from root to leaf, it is recursive rejection for independent samples
(SpecInfer, arXiv 2305.09781) and for samples without replacement (Sequoia, arXiv 2402.12374),
SpecHub (arXiv 2411.05289) for hubs and one sample, and for one sample standard rejection (arXiv
2211.17192).
"""

from typing import NamedTuple

import torch


class NodeOutcome(NamedTuple):
    """What verification does at nodes, as probabilities given the draft: nothing here draws."""

    # [num_rows, max_children]: what a child is accepted with when it is visited, 0 where there is
    # none
    visit: torch.Tensor
    # [num_rows]: what the node itself is accepted with once its children have failed
    leave: torch.Tensor
    # [num_rows, vocab_size]: unnormalised distribution of the token emitted then
    residual: torch.Tensor


def node_outcome(
    # [num_rows, vocab_size]
    target_probs: torch.Tensor,
    # [num_rows, vocab_size]
    draft_logits: torch.Tensor,
    # [num_rows, max_children]
    children: torch.Tensor,
    # [num_rows, max_children]
    sampled: torch.Tensor,
    # [num_rows]
    acceptance: torch.Tensor,
    *,
    replaced: bool,
) -> NodeOutcome:
    """What happens at nodes that are visited with a path acceptance.

    Args:
        target_probs: float32 or float64, p.
        draft_logits: of the same dtype, z: samples are drawn from its softmax off the hubs; -inf
        for tokens that
            cannot be drawn.
        children: int64 tokens in slot order, -1 past a node's last child.
        sampled: bool, which children are samples; the others are hubs.
        acceptance: of the same dtype, a, 0 to 1.
        replaced: samples are independent draws; otherwise each is drawn off those before it.

    Returns:
        The outcome; `leave` is 1 for a = 1, up to rounding.
    """
    token, present = children.clamp(min=0), children >= 0
    hub, sampled = present & ~sampled, present & sampled
    drafted = _set(draft_logits, token, hub, -torch.inf)
    child_draft = draft_logits.gather(1, token)
    # [num_rows, max_children]
    owed_child = acceptance.unsqueeze(1) * target_probs.gather(1, token)
    owed_hubs = owed_child * hub
    # [num_rows, vocab_size]
    owed = _set(acceptance.unsqueeze(1) * target_probs, token, hub, 0.0)
    lacking = 1.0 - acceptance
    log_sums = _log_sums(drafted, token, child_draft, sampled, replaced)

    visit = torch.zeros_like(owed_child)
    failed = torch.zeros_like(sampled)
    residual, mass = owed, owed.sum(dim=1)
    kappa, left = torch.zeros_like(mass), torch.ones_like(mass)
    log_sum = log_sums[:, 0]
    for slot in range(children.shape[1]):
        now = sampled[:, slot]
        z = child_draft[:, slot]
        # A token that failed before has nothing left.
        again = ((token == token[:, slot : slot + 1]) & failed).any(dim=1)
        chance = (owed_child[:, slot] - kappa * torch.exp(z - log_sum)).clamp(min=0)
        chance = _ratio(chance.masked_fill(again, 0.0), left * torch.exp(z - log_sums[:, slot]))
        visit[:, slot] = torch.where(now, chance, 0.0)

        grown = left + kappa * torch.exp(log_sums[:, slot] - log_sum)
        kappa = torch.where(now, grown, kappa)
        log_sum = torch.where(now, log_sums[:, slot], log_sum)
        failed[:, slot] = now
        spent = kappa.unsqueeze(1) * torch.exp(drafted - log_sum.unsqueeze(1))
        rest = _set((owed - spent).clamp(min=0), token, failed, 0.0)
        residual = torch.where(now.unsqueeze(1), rest, residual)
        mass = torch.where(now, rest.sum(dim=1), mass)
        left = torch.where(now, lacking + owed_hubs.sum(dim=1) + mass, left)
    # Summed from the end: nothing cancels.
    unvisited = owed_hubs.flip(1).cumsum(dim=1).flip(1) + (lacking + mass).unsqueeze(1)
    visit = torch.where(hub, _ratio(owed_hubs, unvisited), visit)
    # Nothing left is reached by rounding only, and then with a = 1: the node is accepted, and emits
    # from the target.
    stuck = mass <= 0
    leave = torch.where(
        stuck, (acceptance >= 1).to(mass.dtype), mass / (lacking + mass).masked_fill(stuck, 1.0)
    )
    return NodeOutcome(visit, leave, torch.where(stuck.unsqueeze(1), target_probs, residual))


def _log_sums(drafted, token, child_draft, sampled, replaced) -> torch.Tensor:
    """Log-sum-exp of every slot's distribution, [num_rows, max_children]; finite also where nothing
    can be drawn.

    Without replacement the samples are added back to what is drawn by none, the last first: a
    confident draft, whose mass besides its first sample rounds to nothing, loses no precision.
    """
    undrawn = drafted if replaced else _set(drafted, token, sampled, -torch.inf)
    total = torch.logsumexp(undrawn, dim=1)
    sums = torch.empty_like(child_draft)
    for slot in range(child_draft.shape[1] - 1, -1, -1):
        if not replaced:
            more = torch.logaddexp(total, child_draft[:, slot])
            total = torch.where(sampled[:, slot], more, total)
        sums[:, slot] = total
    return sums.clamp(min=torch.finfo(sums.dtype).min)


def _set(values, token, where, value: float) -> torch.Tensor:
    """A copy with one value at the chosen children's tokens."""
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen.scatter_reduce_(1, token, where, "amax")
    return values.masked_fill(chosen, value)


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """min(1, numerator / denominator), and 0 for 0 / 0: what has no mass is not accepted."""
    enough = numerator >= denominator
    return torch.where(
        enough,
        (numerator > 0).to(numerator.dtype),
        numerator / denominator.masked_fill(enough, 1.0),
    )
