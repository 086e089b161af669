# SPDX-License-Identifier: Apache-2.0
"""The built-in target distributions of a target, p, and a draft, q, which is its other member."""

from typing import ClassVar

import torch

from vllm_spechub.targets.base import Number, TargetDistribution


def _never_empty(
    # [num_rows, vocab_size]
    r: torch.Tensor,
    # [num_rows, vocab_size]
    p: torch.Tensor,
) -> torch.Tensor:
    """Put p's row where no token is left."""
    return torch.where(r.amax(dim=1, keepdim=True) == -torch.inf, p, r)


def _towards(
    # [num_rows, vocab_size]
    p: torch.Tensor,
    # [num_rows, vocab_size]
    q: torch.Tensor,
    # [num_rows, 1]
    weight: torch.Tensor,
) -> torch.Tensor:
    """`(1 - weight) p + weight q`, and -inf for tokens that only one member has, unless the other
    one does not count."""
    lacking = (p == -torch.inf) | (q == -torch.inf)
    return torch.where(weight == 0, p, torch.lerp(p, q, weight).masked_fill_(lacking, -torch.inf))


class Mixture(TargetDistribution):
    """`r = w q + (1 - w) p`, of probabilities: the weighted ensemble of CoS (arXiv 2502.01662).

    Each member's row is processed by the sampling parameters first, so top-k keeps the tokens that
    any member keeps.
    """

    of_processed: ClassVar[bool] = True
    weight: float = Number("a number from 0 to 1", ge=0, le=1)
    """The draft's share."""

    def combine(self, p: torch.Tensor, q: torch.Tensor, **parameters: torch.Tensor) -> torch.Tensor:
        weight = parameters["weight"]
        p, q = p.log_softmax(dim=1), _never_empty(q, p).log_softmax(dim=1)
        return torch.logaddexp(p.add_(torch.log1p(-weight)), q.add_(weight.log()))


class LogitSum(TargetDistribution):
    """`l_r = (1 - w) l_p + w l_q`, of logits: from 0 to 1 the geometric mean `p^(1-w) q^w`, below 0
    away from the draft. (`l_p - mu l_q` of CoS is `w = -mu / (1 - mu)` at a temperature of
    `1 / (1 - mu)`.)"""

    weight: float = Number("a finite number")
    """The draft's share."""

    def combine(self, p: torch.Tensor, q: torch.Tensor, **parameters: torch.Tensor) -> torch.Tensor:
        return _never_empty(_towards(p, q, parameters["weight"]), p)


class Contrastive(TargetDistribution):
    """`l_r = (1 + beta) l_p - beta l_q` for the tokens with `p >= alpha max p`, no other one: the
    draft is the amateur (Li et al., ACL 2023, arXiv 2210.15097, in the form of O'Brien and Lewis,
    arXiv 2309.09117)."""

    beta: float = Number("a finite number from 0", ge=0)
    """How far away from the draft."""
    alpha: float = Number("a number from 0 to 1", ge=0, le=1)
    """The plausibility of a token, relative to the target's best one, below which it is excluded.
    """

    def combine(self, p: torch.Tensor, q: torch.Tensor, **parameters: torch.Tensor) -> torch.Tensor:
        r = _towards(p, q, -parameters["beta"])
        plausible = p >= p.amax(dim=1, keepdim=True) + parameters["alpha"].log()
        return _never_empty(r.masked_fill_(~plausible, -torch.inf), p)
