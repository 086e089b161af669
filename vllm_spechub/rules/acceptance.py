# SPDX-License-Identifier: Apache-2.0
"""Acceptance of one node in closed form, from the target's and the draft's distribution."""

from typing import NamedTuple

import torch

from vllm_spechub.triton_kernels.rules import DEFAULT_RULE, Rule, builtin_rule

MAX_STATES = 1 << 22
"""Most (rejected tokens, next token) pairs that sampling without replacement is summed over."""


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
    # [..., k]: probability that the child of each slot is accepted; None without a closed form
    slots: torch.Tensor | None


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

    With H the k - 1 most probable tokens of q, Z = q off H and w the distribution of the sampled
    child, proportional to `q ** sharpening` off H:

    - "ordered", "unordered" and "traversal": `p(H) + sum off H of min(p, w)`. They differ in the
      slots. Traversal's slots hold for children that are leaves; those with subtrees are accepted
      more often, by an amount that depends on what was drafted below them.
    - "chain" (k = 1): `sum of min(p, q)`.
    - "rrs" (k draws from q): the residual after each rejection is one and the same whatever was
      drawn, so every slot is a sum over the vocabulary.
    - "rrsw" (k draws without replacement): the residual after each rejection is `(p - t q)+`, up
      to its mass, with a t that depends on what was drawn; slots are sums over all sequences of
      rejected tokens. They grow as `vocab_size ** (k - 1)`.

    Args:
        p: the target's distribution, any float dtype.
        q: the draft's, of the same shape.
        k: children, 1 to 4 and at most vocab_size.
        rule: a built-in rule's name.
        sharpening: exponent of the sampled child's distribution; 1 leaves it alone.

    Returns:
        `node` and `slots`, float64, in the order of the rule's slots.

    Raises:
        ValueError: names the argument: shapes that differ, rows that are no distributions, an
            unknown rule, a k that the rule does not take, or "rrsw" beyond `MAX_STATES`.

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
    if row.replaces:
        slots = _with_replacement(p, q, k)
    elif row.is_recursive:
        slots = torch.stack([_without_replacement(*pair, k) for pair in zip(p, q, strict=True)])
    else:
        slots = _spechub(p, q, k, row, sharpening)
    return Acceptance(slots.sum(dim=1).reshape(lead), slots.reshape(*lead, k))


class SampledDistribution(NamedTuple):
    """SpecHub's draft at a node, before a sample is drawn."""

    # [num_rows, k - 1]
    hubs: torch.Tensor
    # [num_rows, vocab_size]: distribution of the sampled child, 0 at the hubs
    w: torch.Tensor
    # [num_rows, 1]: the draft's mass off the hubs
    off_hub_mass: torch.Tensor


def sampled_distribution(
    # [num_rows, vocab_size]
    q: torch.Tensor,
    k: int,
    sharpening: float,
) -> SampledDistribution:
    """The hubs (ties: lowest id first) and `w`, a point mass on the next rank where Z is 0."""
    ranked = q.argsort(dim=1, descending=True, stable=True)
    hubs = ranked[:, : k - 1]
    off_hub = q.scatter(1, hubs, 0.0)
    mass = off_hub.sum(dim=1, keepdim=True)
    # Divided by its peak first: a small mass must not underflow when raised to a power.
    peak = off_hub.amax(dim=1, keepdim=True)
    w = (off_hub / peak.masked_fill(peak == 0, 1.0)).pow(sharpening).masked_fill(off_hub == 0, 0.0)
    w = w.scatter_add(1, ranked[:, k - 1 : k], (peak == 0).to(w.dtype))
    return SampledDistribution(hubs, w / w.sum(dim=1, keepdim=True), mass)


def _spechub(
    # [num_rows, vocab_size]
    p: torch.Tensor,
    # [num_rows, vocab_size]
    q: torch.Tensor,
    k: int,
    rule: Rule,
    sharpening: float,
) -> torch.Tensor:
    drafted = sampled_distribution(q, k, sharpening)
    hub_target = p.gather(1, drafted.hubs)
    off_hub = p.scatter(1, drafted.hubs, 0.0)
    if not rule.ordered_slots or k == 1:
        sample = torch.minimum(off_hub, drafted.w).sum(dim=1, keepdim=True)
        return torch.cat([hub_target, sample], dim=1)
    hub_draft = q.gather(1, drafted.hubs)
    hub_mass = hub_draft.sum(dim=1, keepdim=True)
    if rule.is_leaf_to_root:
        # As unordered, but main, which is independent of what is accepted, comes first.
        sample = torch.minimum(off_hub, drafted.w).sum(dim=1)
        slots = p.new_zeros(p.shape[0], k)
        slots[:, 0] = drafted.off_hub_mass[:, 0] * sample + (hub_draft * hub_target).sum(dim=1)
        slots[:, -1] += hub_mass[:, 0] * sample
        _add_hubs_behind(slots, hub_target, drafted.off_hub_mass[:, 0], hub_draft)
        return slots
    # `main` is distributed as q on the hubs and as Z w off them.
    main = drafted.off_hub_mass * drafted.w
    excess = (off_hub - main).clamp(min=0)
    unclaimed = (hub_mass * drafted.w - excess).clamp(min=0).sum(dim=1, keepdim=True)
    share = unclaimed * hub_draft / hub_mass
    gain = (hub_target - share).clamp(min=0)
    # What fails with the sampled child as main, and with each hub.
    sample_lost = (main - off_hub).clamp(min=0).sum(dim=1, keepdim=True)
    hub_lost = (share - hub_target).clamp(min=0)
    pool = sample_lost + hub_lost.sum(dim=1, keepdim=True)
    gain_share = gain / pool.masked_fill(pool == 0, 1.0)
    slots = p.new_zeros(p.shape[0], k)
    slots[:, 0] = torch.minimum(off_hub, main).sum(dim=1)
    slots[:, 0] += torch.minimum(hub_target, share).sum(dim=1)
    slots[:, -1] += torch.minimum(excess, hub_mass * drafted.w).sum(dim=1)
    _add_hubs_behind(slots, gain_share, sample_lost[:, 0], hub_lost)
    return slots


def _add_hubs_behind(
    # [num_rows, k], added to
    slots: torch.Tensor,
    # [num_rows, k - 1]: each hub's chance where it is not the main child
    chance: torch.Tensor,
    # [num_rows]: how often the sampled child is the main child
    sample_main: torch.Tensor,
    # [num_rows, k - 1]: how often each hub is
    hub_main: torch.Tensor,
) -> None:
    """Hubs behind the main child keep their rank, one slot later if they stand before it."""
    for rank in range(chance.shape[1]):
        later = sample_main + hub_main[:, rank + 1 :].sum(dim=1)
        slots[:, rank + 1] += chance[:, rank] * later
        slots[:, rank] += chance[:, rank] * hub_main[:, :rank].sum(dim=1)


def _with_replacement(
    # [num_rows, vocab_size]
    p: torch.Tensor,
    # [num_rows, vocab_size]
    q: torch.Tensor,
    k: int,
) -> torch.Tensor:
    slots = []
    reached = torch.ones_like(p[:, :1])
    for _ in range(k):
        left = (p - q).clamp(min=0)
        rejected = left.sum(dim=1, keepdim=True)
        slots.append(reached * (1 - rejected))
        reached = reached * rejected
        p = left / rejected.masked_fill(rejected == 0, 1.0)
    return torch.cat(slots, dim=1)


def _without_replacement(
    # [vocab_size]
    p: torch.Tensor,
    # [vocab_size]
    q: torch.Tensor,
    k: int,
) -> torch.Tensor:
    vocab_size = len(p)
    if vocab_size ** (k - 1) > MAX_STATES:
        raise ValueError(
            f"k: rule 'rrsw' sums over {vocab_size}^{k - 1} sequences of rejected tokens, at most "
            f"{MAX_STATES} allowed; give a smaller k or fewer tokens"
        )
    rank = q.argsort(descending=True, stable=True)
    # One state per sequence of rejected tokens: its probability, the t of its residual
    # (p - t q)+ and that residual's mass, and which tokens are taken.
    reached, t, mass = p.new_ones(1), p.new_zeros(1), p.new_ones(1)
    taken = torch.zeros(1, vocab_size, dtype=torch.bool, device=p.device)
    # The residual's mass at any t, from prefix sums over tokens by falling p / q.
    by_ratio = (p / q).nan_to_num(nan=0.0).argsort(descending=True)
    ratios = (p / q).nan_to_num(nan=0.0)[by_ratio]
    p_above = torch.cat([p.new_zeros(1), p[by_ratio].cumsum(0)])
    q_above = torch.cat([q.new_zeros(1), q[by_ratio].cumsum(0)])

    def residual_mass(t: torch.Tensor) -> torch.Tensor:
        count = torch.searchsorted(-ratios, -t, right=False)
        return (p_above[count] - t * q_above[count]).clamp(min=0)

    slots = p.new_zeros(k)
    for slot in range(k):
        free = (~taken).double() @ q
        spent = free <= 0
        next_t = t + mass / free.masked_fill(spent, 1.0)
        next_mass = residual_mass(next_t)
        # Where nothing is left to draw, the draft takes the best-ranked free token.
        best = rank[(~taken[:, rank]).double().argmax(dim=1)]
        at_best = (p[best] - t * q[best]).clamp(min=0)
        next_mass = torch.where(spent, mass - at_best, next_mass)
        next_t = torch.where(spent, t, next_t)
        slots[slot] = (reached * (1 - next_mass / mass)).sum()
        if slot == k - 1:
            break
        # [num_states, vocab_size]: which token is drawn and rejected
        residual = (p - t.unsqueeze(1) * q).clamp(min=0) / mass.unsqueeze(1)
        draft = (q / free.masked_fill(spent, 1.0).unsqueeze(1)).masked_fill(taken, 0.0)
        point = torch.zeros_like(draft).scatter_(1, best.unsqueeze(1), 1.0)
        draft = torch.where(spent.unsqueeze(1), point, draft)
        rejected = reached.unsqueeze(1) * (draft - residual).clamp(min=0)
        state, token = ((rejected > 0) & (next_mass > 0).unsqueeze(1)).nonzero(as_tuple=True)
        reached, t, mass = rejected[state, token], next_t[state], next_mass[state]
        taken = taken[state].scatter(1, token.unsqueeze(1), True)
    return slots
