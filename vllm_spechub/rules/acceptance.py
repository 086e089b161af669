# SPDX-License-Identifier: Apache-2.0
"""Acceptance of one node in closed form, from the target's and the draft's distribution."""

from typing import NamedTuple

import torch

from vllm_spechub.triton_kernels.constants import CONFIDENT, FIRST_SAMPLE_LOSS, SAMPLE_SHARES
from vllm_spechub.triton_kernels.rules import DEFAULT_RULE, Rule, builtin_rule

MAX_STATES = 1 << 22
"""Most sequences of rejected samples that sampling without replacement is summed over."""


def check_probs(
    name: str,
    # [..., vocab_size]
    probs: torch.Tensor,
    shape: tuple[int, ...] | None = None,
) -> None:
    """Refuse what is not a batch of distributions over the last dimension."""
    if not isinstance(probs, torch.Tensor) or not probs.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor")
    if shape is not None and tuple(probs.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, not {list(probs.shape)}")
    if probs.dim() == 0 or probs.shape[-1] == 0:
        raise ValueError(f"{name} must be [..., vocab_size], not {list(probs.shape)}")
    # A comparison with NaN is false, so each test is put the way that lets NaN fail.
    if not bool((probs >= 0).all()):
        raise ValueError(f"{name} has negative entries or NaN")
    wide = probs if probs.dtype == torch.float64 else probs.float()
    tolerance = 1e-3 if probs.element_size() > 2 else 2e-2
    off = (wide.sum(dim=-1) - 1).abs()
    if not bool((off <= tolerance).all()):
        raise ValueError(f"{name} has rows that do not sum to 1 (off by {off.max().item():.3g})")


class Acceptance(NamedTuple):
    """What a node with k leaf children accepts, before anything is drafted."""

    # [...]: probability that some child is accepted
    node: torch.Tensor
    # [..., k]: probability that the child of each slot is accepted
    slots: torch.Tensor


def acceptance(
    # [..., vocab_size]
    p: torch.Tensor,
    # [..., vocab_size]
    q: torch.Tensor,
    k: int,
    rule: str = DEFAULT_RULE,
    *,
    sharpening: float = 1.0,
) -> Acceptance:
    """The probability that a node accepts one of its k children, and which.

    With H the node's hubs and w the draft off them, to the power of `sharpening` and renormalised,
    a hub h is accepted with p(h), and the samples with:

    - one sample: `sum off H of min(p, w)`;
    - independent samples (no hubs): the residual after each rejection is one and the same whatever
      was drawn, so
      every slot is a sum over the vocabulary;
    - samples without replacement: the residual after each rejection is `(p - t w)+` off H and off
      what was drawn,
      with a t that depends on what was drawn. What samples accept is a sum over all sequences of
      rejected ones, which grow as `vocab_size ** (samples - 1)`.

    From leaf to root this holds for children that are leaves. Those with subtrees are accepted more
    often, by an amount that depends on what was drafted below them.

    Args:
        p: the target's distribution, any float dtype.
        q: the draft's, of the same shape.
        k: children, 1 to 4 and at most vocab_size.
        rule: a built-in rule's name.
        sharpening: exponent of the samples' distribution; 1 leaves it alone.

    Returns:
        `node` and `slots`, float64, in the order of the rule's slots.

    Raises:
        ValueError: names the argument: shapes that differ, rows that are no distributions, an
        unknown rule, a k that
            the rule does not take, or more than `MAX_STATES` sequences.

    Examples::

        >>> p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.6, 0.2, 0.2])
        >>> round(acceptance(p, q, 2, "ordered").node.item(), 3)  # p(0) + min(.3, .5) + min(.2, .5)
        1.0
    """
    row = builtin_rule(rule, sharpening, max_children=1)
    check_probs("p", p)
    check_probs("q", q)
    if p.shape != q.shape:
        raise ValueError(f"q must be {list(p.shape)}, as p is, not {list(q.shape)}")
    most = min(row.max_children, p.shape[-1])
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= most:
        raise ValueError(f"k must be in 1..{most} for rule {rule!r}, got {k!r}")
    lead = p.shape[:-1]
    # [num_rows, vocab_size]
    p, q = (value.double().reshape(-1, value.shape[-1]) for value in (p, q))
    slots = torch.stack([_slots(*pair, k, row, sharpening) for pair in zip(p, q, strict=True)])
    return Acceptance(slots.sum(dim=1).reshape(lead), slots.reshape(*lead, k))


class NodeDraft(NamedTuple):
    """How a node's children are drafted, before any of them is."""

    # tokens, by rank; those that follow the samples where the draft has too few tokens to draw are
    # among them
    hubs: list[int]
    num_samples: int
    # [vocab_size]: distribution of the first sample, 0 at the hubs
    w: torch.Tensor
    # [k]: the children in slot order, given by their place among the samples and then the hubs
    order: list[int]


def node_draft(
    # [vocab_size]
    q: torch.Tensor,
    k: int,
    rule: Rule,
    sharpening: float,
) -> NodeDraft:
    """From the draft's distribution, float64. Of tokens that are as probable the lowest id ranks
    first."""
    never, always, confident = rule.hubs.value
    ranked = q.argsort(descending=True, stable=True).tolist()
    num_hubs = min(k - never, always)
    while num_hubs < min(k - never, confident) and q[ranked[num_hubs]] > CONFIDENT:
        num_hubs += 1
    hubs = ranked[:num_hubs]
    off_hubs = q.clone()
    off_hubs[hubs] = 0.0
    z = float(off_hubs.sum())
    possible = int((off_hubs > 0).sum())
    num_samples = k - num_hubs if rule.replaces and possible else min(k - num_hubs, possible)
    hubs += ranked[num_hubs + num_samples : k]
    # Divided by its peak first: a small mass must not underflow when raised to a power.
    w = (
        (off_hubs / off_hubs.max().clamp(min=1e-300))
        .pow(sharpening)
        .masked_fill(off_hubs == 0, 0.0)
    )
    expected = [share * z for share in SAMPLE_SHARES[:num_samples]]
    if expected:
        expected[0] *= 1.0 - FIRST_SAMPLE_LOSS * z
    expected += q[hubs].tolist()
    order = list(range(k))
    if rule.ranks_subtrees:
        order.sort(key=lambda child: -expected[child])
    elif num_samples:  # hubs first, but for those that stand in for samples
        order = [*range(num_samples, num_samples + num_hubs), *range(num_samples)]
        order += range(num_samples + num_hubs, k)
    return NodeDraft(hubs, num_samples, w / w.sum().clamp(min=1e-300), order)


def _slots(
    # [vocab_size]
    p: torch.Tensor,
    # [vocab_size]
    q: torch.Tensor,
    k: int,
    rule: Rule,
    sharpening: float,
) -> torch.Tensor:
    """What the child of every slot is accepted with. [k] float64"""
    drafted = node_draft(q, k, rule, sharpening)
    hub_target = p[drafted.hubs]
    target = p.clone()
    target[drafted.hubs] = 0.0
    if drafted.num_samples == 1:
        samples = torch.minimum(target, drafted.w).sum().reshape(1)
    elif rule.replaces:
        samples = _independent(target, drafted.w, drafted.num_samples)
    else:
        hub_mass = float(hub_target.sum())
        samples = _without_replacement(target, drafted.w, hub_mass, drafted.num_samples)
    return torch.cat([samples, hub_target])[drafted.order]


def _independent(
    # [vocab_size]
    p: torch.Tensor,
    # [vocab_size]
    q: torch.Tensor,
    count: int,
) -> torch.Tensor:
    """What each of several independent draws is accepted with, by recursive rejection. [count]"""
    slots, reached = [], p.new_ones(())
    for _ in range(count):
        left = (p - q).clamp(min=0)
        rejected = left.sum()
        slots.append(reached * (1 - rejected))
        reached = reached * rejected
        p = left / rejected if rejected > 0 else left
    return torch.stack(slots) if slots else p[:0]


def _without_replacement(
    # [vocab_size], off the hubs
    p: torch.Tensor,
    # [vocab_size], 0 at the hubs
    w: torch.Tensor,
    hub_mass: float,
    count: int,
) -> torch.Tensor:
    """What each draw without replacement is accepted with. [count]"""
    vocab_size = len(p)
    if count == 0:
        return p[:0]
    if vocab_size ** (count - 1) > MAX_STATES:
        raise ValueError(
            f"k: draws without replacement are summed over {vocab_size}^{count - 1} sequences of "
            f"rejected tokens, at most {MAX_STATES} allowed; give a smaller k or fewer tokens"
        )
    # One state per sequence of rejected tokens: its probability, the t of its residual (p - t w)+,
    # what is left to emit (hubs included), and which tokens are taken.
    reached, t, left = p.new_ones(1), p.new_zeros(1), p.new_ones(1)
    taken = torch.zeros(1, vocab_size, dtype=torch.bool, device=p.device)
    # The residual's mass at any t, from prefix sums over tokens by falling p / w.
    by_ratio = (p / w).nan_to_num(nan=0.0).argsort(descending=True)
    ratios = (p / w).nan_to_num(nan=0.0)[by_ratio]
    p_above = torch.cat([p.new_zeros(1), p[by_ratio].cumsum(0)])
    w_above = torch.cat([w.new_zeros(1), w[by_ratio].cumsum(0)])

    def residual_mass(t: torch.Tensor) -> torch.Tensor:
        number = torch.searchsorted(-ratios, -t, right=False)
        return (p_above[number] - t * w_above[number]).clamp(min=0)

    slots = p.new_zeros(count)
    for slot in range(count):
        free = (~taken).double() @ w
        next_t = t + left / free
        next_left = hub_mass + residual_mass(next_t)
        slots[slot] = (reached * (1 - next_left / left)).sum()
        if slot == count - 1:
            break
        # [num_states, vocab_size]: which token is drawn and rejected
        residual = (p - t.unsqueeze(1) * w).clamp(min=0) / left.unsqueeze(1)
        draft = (w / free.unsqueeze(1)).masked_fill(taken, 0.0)
        rejected = reached.unsqueeze(1) * (draft - residual.masked_fill(taken, 0.0)).clamp(min=0)
        state, token = ((rejected > 0) & (next_left > 0).unsqueeze(1)).nonzero(as_tuple=True)
        reached, t, left = rejected[state, token], next_t[state], next_left[state]
        taken = taken[state].scatter(1, token.unsqueeze(1), True)
    return slots
