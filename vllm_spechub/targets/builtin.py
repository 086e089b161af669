# SPDX-License-Identifier: Apache-2.0
"""The built-in target distributions of a target, p, and of other models, q: a draft, members."""

from collections.abc import Sequence
from math import fsum
from typing import ClassVar

import torch
from pydantic import Field

from vllm_spechub.targets.base import MEMBER_WEIGHTS, Member, Number, TargetDistribution


def _never_empty(
    # [num_rows, vocab_size]
    r: torch.Tensor,
    # [num_rows, vocab_size]
    p: torch.Tensor,
) -> torch.Tensor:
    """Put p's row where no token is left."""
    return torch.where(r.amax(dim=1, keepdim=True) == -torch.inf, p, r)


def _weighted_sum(
    # [num_rows, vocab_size]
    p: torch.Tensor,
    # [num_rows, vocab_size] each
    others: Sequence[torch.Tensor],
    # [num_rows, num_others]
    weights: torch.Tensor,
) -> torch.Tensor:
    """`(1 - sum w) p + sum w q`, and -inf for tokens that some model lacks, unless it does not
    count."""
    r = p * (1 - weights.sum(dim=1, keepdim=True))
    lacking = p == -torch.inf
    for q, weight in zip(others, weights.split(1, dim=1), strict=True):
        counts = weight != 0
        lacking |= (q == -torch.inf) & counts
        r += (q * weight).masked_fill_(~counts, 0)
    return r.masked_fill_(lacking, -torch.inf)


class Share(Member):
    """A member with a weight that is a part of the whole."""

    weight: float = Number("a number from 0 to 1", ge=0, le=1)


class Factor(Member):
    """A member with any weight."""

    weight: float = Number("a finite number")


class Weighted(TargetDistribution):
    """One in which every model but the target has a weight, and the target has 1 less their sum.

    The draft has a weight, or is no part of it.
    """

    weight: float | None = None
    members: tuple[Factor, ...] = Field((), description="a list of members")

    @property
    def parameters(self) -> dict[str, float | list[float]]:
        weights = [member.weight for member in self.members]
        return super().parameters | ({MEMBER_WEIGHTS: weights} if weights else {})

    @property
    def reads_draft(self) -> bool:
        return self.weight is not None

    def check(self) -> None:
        if not self.num_others:
            field = type(self).model_fields["weight"]
            raise ValueError(
                f"weight is missing, allowed: {field.description}, the draft's; or leave it out "
                "beside members"
            )

    @staticmethod
    def weights(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        """Those of the draft, if it is read, and of the members. [num_rows, num_others]"""
        given = [parameters[name] for name in ("weight", MEMBER_WEIGHTS) if name in parameters]
        return torch.cat(given, dim=1)


class Mixture(Weighted):
    """`r = w q + (1 - w) p`, of probabilities: the weighted ensemble of CoS (arXiv 2502.01662).

    Each model's row is processed by the sampling parameters first, so top-k keeps the tokens that
    any of them keeps.
    """

    of_processed: ClassVar[bool] = True
    weight: float | None = Number("a number from 0 to 1", default=None, ge=0, le=1)
    """The draft's share."""
    members: tuple[Share, ...] = Field((), description="a list of members")

    def check(self) -> None:
        super().check()
        total = fsum([self.weight or 0, *(member.weight for member in self.members)])
        if total > 1:
            raise ValueError(
                f"weights add up to {total:g}, allowed: at most 1, as the target has the rest"
            )

    def combine(
        self, p: torch.Tensor, others: Sequence[torch.Tensor], **parameters: torch.Tensor
    ) -> torch.Tensor:
        weights = self.weights(parameters)
        rest = (1 - weights.sum(dim=1, keepdim=True)).clamp_(min=0)  # but for rounding
        r = p.log_softmax(dim=1).add_(rest.log())
        for q, weight in zip(others, weights.split(1, dim=1), strict=True):
            shared = _never_empty(q, p).log_softmax(dim=1).add_(weight.log())
            r = torch.logaddexp(r, shared, out=r)
        return r


class LogitSum(Weighted):
    """`l_r = (1 - w) l_p + w l_q`, of logits: from 0 to 1 the geometric mean `p^(1-w) q^w`, below 0
    away from the draft. (`l_p - mu l_q` of CoS is `w = -mu / (1 - mu)` at a temperature of
    `1 / (1 - mu)`.) With members of weights `a` and `-a` it is proxy tuning (Liu et al., COLM 2024,
    arXiv 2401.08565) and DExperts (ACL 2021, arXiv 2105.03023): `l_p + a (l_expert - l_anti)`.
    """

    weight: float | None = Number("a finite number", default=None)
    """The draft's share."""

    def combine(
        self, p: torch.Tensor, others: Sequence[torch.Tensor], **parameters: torch.Tensor
    ) -> torch.Tensor:
        return _never_empty(_weighted_sum(p, others, self.weights(parameters)), p)


class Contrastive(TargetDistribution):
    """`l_r = (1 + beta) l_p - beta l_q` for the tokens with `p >= alpha max p`, no other one: the
    draft, or the member in its place, is the amateur (Li et al., ACL 2023, arXiv 2210.15097, in the
    form of O'Brien and Lewis, arXiv 2309.09117)."""

    beta: float = Number("a finite number from 0", ge=0)
    """How far away from the amateur."""
    alpha: float = Number("a number from 0 to 1", ge=0, le=1)
    """The plausibility of a token, relative to the target's best one, below which it is excluded.
    """

    def combine(
        self, p: torch.Tensor, others: Sequence[torch.Tensor], **parameters: torch.Tensor
    ) -> torch.Tensor:
        r = _weighted_sum(p, others, -parameters["beta"])
        plausible = p >= p.amax(dim=1, keepdim=True) + parameters["alpha"].log()
        return _never_empty(r.masked_fill_(~plausible, -torch.inf), p)
