# SPDX-License-Identifier: Apache-2.0
"""Combined rows against their definitions in exact arithmetic, and what is refused."""

from fractions import Fraction as F

import pytest
import torch
from vllm import SamplingParams

from helpers.enumeration import DRAFTING, Context, Model, Row, Walk, normalised, total_variation
from vllm_spechub.registry import TARGETS
from vllm_spechub.targets.base import TargetDistribution, parse_target

SPECS = [
    {"type": "mixture", "weight": 0.25},
    {"type": "logits", "weight": -1.0},
    {"type": "logits", "weight": 2.0},
    {"type": "contrastive", "beta": 1.0, "alpha": 0.5},
]


def power(x: F, n: int) -> F:
    return x**n if x else F(int(n == 0))


def combined(spec: dict, p: Row, q: Row) -> Row:
    """The distribution that a specification states of p and q."""
    if not any(q):
        return p
    if spec["type"] == "mixture":
        w = F(spec["weight"])
        return tuple(w * y + (1 - w) * x for x, y in zip(p, q, strict=True))
    w = int(spec["weight"] if spec["type"] == "logits" else -spec["beta"])
    floor = F(spec.get("alpha", 0)) * max(p)
    weights = [
        power(x, 1 - w) * power(y, w) if x and y and x >= floor else F(0)
        for x, y in zip(p, q, strict=True)
    ]
    return normalised(weights) if any(weights) else p


class Combined(Model):
    """A target that a draft is a member of."""

    spec: dict

    def __post_init__(self):
        super().__post_init__()
        alone, self.rows = self.target, []

        def target(context: Context) -> Row:
            p, q = alone(context), self.draft(context)
            r = combined(self.spec, p, q)
            self.rows.append((p, q, r))
            return r

        self.target = target


def logits(rows: list[Row]) -> torch.Tensor:
    return torch.tensor([[*map(float, row)] for row in rows], dtype=torch.float64).log()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("rule", ["traversal", "rrs", "match"])
def test_lossless(rule, spec):
    """A step emits r exactly, and `combine` gives every row of it. Rows are shifted, as logits may
    be."""
    target, leaf = parse_target(spec), ()
    for seed in (0, 1):
        model = Combined(3, seed)
        model.spec = spec
        walk = Walk(model, DRAFTING[rule])
        emitted = walk.step(((leaf, leaf), (leaf,)))
        assert sum(emitted.values()) == 1
        assert total_variation(model, emitted, 3) == 0
        p, q, r = map(logits, zip(*set(model.rows), strict=True))
        parameters = {k: torch.full((len(p), 1), v).double() for k, v in target.parameters.items()}
        found = target.combine(p + 3, q - 2, **parameters)
        torch.testing.assert_close(found.softmax(1), r.exp(), rtol=0, atol=1e-12)


def test_each_row_has_parameters_of_its_own():
    p, q = torch.tensor([[0.0, 2.0, 1.0]]).repeat(3, 1), torch.tensor([[3.0, 0.0, -torch.inf]] * 3)
    weight = torch.tensor([[0.0], [0.5], [1.0]])
    for name in ("mixture", "logits"):
        r = parse_target({"type": name, "weight": 0}).combine(p.clone(), q, weight=weight)
        ends = torch.stack([p[0], q[0]]).softmax(1)
        torch.testing.assert_close(r[::2].softmax(1), ends)
    beta, alpha = torch.zeros(3, 1), torch.tensor([[0.0], [0.3], [1.0]])
    r = parse_target({"type": "contrastive", "beta": 0, "alpha": 0}).combine(
        p, q, beta=beta, alpha=alpha
    )
    assert (r > -torch.inf).sum(1).tolist() == [3, 2, 1]


REFUSED = {
    "type is None": "mixture",
    "type is 'mean', allowed: an object with a type of mixture, logits, contrastive": {
        "type": "mean"
    },
    "weight is 1.5, allowed: a number from 0 to 1": {"type": "mixture", "weight": 1.5},
    "weight is '1', allowed: a number from 0 to 1": {"type": "mixture", "weight": "1"},
    "weight is nan, allowed: a finite number": {"type": "logits", "weight": float("nan")},
    "allowed: an object with all of: beta, a finite number from 0; alpha, a number": {
        "type": "contrastive",
        "beta": 1,
    },
    "gamma is not an option": {"type": "mixture", "weight": 0.5, "gamma": 1},
    "members is not supported: the draft model is the only": {
        "type": "mixture",
        "weight": 0.5,
        "members": [],
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_options_that_are_refused(message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        parse_target(REFUSED[message])
    assert message in str(error.value)


def asked(**extra_args) -> TargetDistribution | None:
    target = parse_target({"type": "contrastive", "beta": 0.5, "alpha": 0.1})
    return target.of_request(SamplingParams(extra_args=extra_args).extra_args)


def test_what_a_request_may_ask_for():
    assert asked().parameters == asked(repel=3).parameters == {"beta": 0.5, "alpha": 0.1}
    assert asked(target_beta=2, target_alpha=0.0).parameters == {"beta": 2, "alpha": 0}
    assert asked(target_distribution="off") is None
    for extra_args, message in (
        ({"target_beta": -1}, "target_beta is -1, allowed: a finite number from 0"),
        ({"target_beta": "2"}, "target_beta is '2', allowed: a finite number from 0"),
        ({"target_weight": 1}, "is not a parameter of target_distribution 'contrastive', allowed:"),
        ({"target_distribution": "mixture"}, "is 'mixture', allowed: 'off'"),
        ({"target_distribution": "off", "target_beta": 1}, "without other keys"),
    ):
        with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
            asked(**extra_args)
        assert message in str(error.value)


def test_every_type_has_a_class():
    assert [TARGETS.load(name).__name__ for name in TARGETS] == [
        "Mixture",
        "LogitSum",
        "Contrastive",
    ]
