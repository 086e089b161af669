# SPDX-License-Identifier: Apache-2.0
"""The most that any verification could accept: optimal transport with a membership cost.

For a draft that hands a set S of children to the verification with probability Q(S), a lossless
verification accepts at most the optimum of a linear program over `pi(S, i)`, the probability that
S is drafted and its token i accepted (SpecTr, Sun et al., NeurIPS 2023, arXiv 2310.15141):

    maximise  sum of pi(S, i)   over i in S
    with      sum over i of pi(S, i) <= Q(S),   sum over S of pi(S, i) <= p_i.

The sets are many, so this is a yardstick for small vocabularies, not a verifier.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from vllm_spechub.rules.acceptance import check_probs, node_draft
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES, builtin_rule

MAX_VOCAB_SIZE = 12


def draft_sets(
    q: Sequence[float], k: int, rule: str, *, sharpening: float = 1.0
) -> dict[frozenset[int], float]:
    """How probable each set of children is that `rule` drafts at a node.

    Args:
        q: the draft's distribution. [vocab_size]
        k: children.
        rule: a built-in rule's name.
        sharpening: the exponent that the sampled child is drawn with, for SpecHub drafts.

    Returns:
        The probability of every set that can be drafted. Independent draws may coincide, so
        sets of "rrs" have 1 to k tokens; those of the other rules have k.
    """
    drafted = node_draft(
        torch.as_tensor(q, dtype=torch.float64), k, BUILTIN_RULES[rule], sharpening
    )
    w, replaces = drafted.w.tolist(), BUILTIN_RULES[rule].replaces
    possible = [token for token, prob in enumerate(w) if prob > 0]
    sequences = itertools.product(possible, repeat=drafted.num_samples)
    probs: dict[frozenset[int], float] = defaultdict(float)
    for draw in sequences:
        if not replaces and len(set(draw)) < len(draw):
            continue
        prob, left = 1.0, list(w)
        for token in draw:
            # Added up anew: one minus what is gone loses all digits where little is left.
            prob *= w[token] / sum(left)
            left[token] = w[token] if replaces else 0.0
        probs[frozenset([*drafted.hubs, *draw])] += prob
    return probs


def otm(
    # [vocab_size]
    p: torch.Tensor | Sequence[float],
    # [vocab_size]
    q: torch.Tensor | Sequence[float],
    k: int,
    rule: str,
    *,
    sharpening: float = 1.0,
) -> float:
    """The most that a lossless verification can accept of `rule`'s drafts at one node.

    Args:
        p: the target's distribution. [vocab_size], at most 12
        q: the draft's. [vocab_size]
        k: children, 1 to 4 and at most vocab_size.
        rule: a built-in rule: whose drafts; how it verifies does not matter.
        sharpening: the exponent that the sampled child is drawn with, for SpecHub drafts.

    Returns:
        The optimum, a float in 0..1.

    Raises:
        ValueError: names the argument: too large a vocabulary, shapes that differ, no
            distributions, an unknown rule or a k that it does not take.

    Examples::

        >>> round(otm([0.5, 0.3, 0.2], [0.6, 0.2, 0.2], 2, "rrs"), 3)
        0.94
    """
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    row = builtin_rule(rule, sharpening, max_children=1)
    p, q = (torch.as_tensor(probs, dtype=torch.float64) for probs in (p, q))
    for name, probs in (("p", p), ("q", q)):
        if probs.dim() != 1 or len(probs) > MAX_VOCAB_SIZE:
            raise ValueError(f"{name} must be [vocab_size] with at most {MAX_VOCAB_SIZE} tokens")
        check_probs(name, probs)
    if p.shape != q.shape:
        raise ValueError(f"q must be {list(p.shape)}, as p is, not {list(q.shape)}")
    most = min(row.max_children, len(p))
    if not 1 <= k <= most:
        raise ValueError(f"k must be in 1..{most} for rule {rule!r}, got {k!r}")

    sets = draft_sets(q.tolist(), k, rule, sharpening=sharpening)
    # One variable per (set, member); one bound per set, then one per token.
    pairs = [(row, token) for row, tokens in enumerate(sets) for token in sorted(tokens)]
    rows = [row for row, _ in pairs] + [len(sets) + token for _, token in pairs]
    columns = [*range(len(pairs)), *range(len(pairs))]
    bounds = csr_array((np.ones(len(rows)), (rows, columns)), (len(sets) + len(p), len(pairs)))
    limits = np.concatenate([np.fromiter(sets.values(), float), p.numpy()])
    solution = linprog(-np.ones(len(pairs)), A_ub=bounds, b_ub=limits, method="highs")
    if not solution.success:
        raise RuntimeError(f"the linear program has no solution: {solution.message}")
    return float(-solution.fun)
