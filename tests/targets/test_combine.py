# SPDX-License-Identifier: Apache-2.0
"""Combined rows against their definitions in exact arithmetic, and what is refused."""

from fractions import Fraction as F
from math import prod

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from helpers.enumeration import DRAFTING, Context, Model, Row, Walk, normalised, total_variation
from vllm_spechub.registry import TARGETS
from vllm_spechub.targets.base import TargetDistribution, parse_target

SPECS = [
    {"type": "mixture", "weight": 0.25},
    {"type": "mixture", "weight": 0.25, "members": [0.5, 0.125]},
    {"type": "mixture", "members": [0.75]},
    {"type": "logits", "weight": -1.0},
    {"type": "logits", "weight": 2.0},
    {"type": "logits", "weight": 2.0, "members": [-2.0]},
    {"type": "logits", "members": [1.0, -1.0]},
    {"type": "contrastive", "beta": 1.0, "alpha": 0.5},
    {"type": "contrastive", "beta": 1.0, "alpha": 0.5, "members": [None]},
]
"""In place of each member its weight."""


def named(spec: dict) -> dict:
    """A specification as users write it."""
    members = [
        {"model": f"model {i}"} | ({} if weight is None else {"weight": weight})
        for i, weight in enumerate(spec.get("members", ()))
    ]
    return spec | ({"members": members} if members else {})


def combined(spec: dict, p: Row, others: list[Row]) -> Row:
    """The distribution that a specification states of p and the others."""
    weights = [spec["weight"]] if "weight" in spec else []
    weights += spec.get("members", [])
    if spec["type"] == "contrastive":
        weights = [-spec["beta"]]
    weights = [*map(F, weights)]
    rows, weights = [p, *others], [1 - sum(weights), *weights]
    if spec["type"] == "mixture":
        weighted = [(w, row if any(row) else p) for w, row in zip(weights, rows, strict=True)]
        return tuple(sum(w * row[x] for w, row in weighted) for x in range(len(p)))
    floor = F(spec.get("alpha", 0)) * max(p)
    products = []
    for xs in zip(*rows, strict=True):
        counting = [(int(w), x) for w, x in zip(weights, xs, strict=True) if w]
        possible = xs[0] and xs[0] >= floor and all(x for _, x in counting)
        products.append(prod(x**w for w, x in counting) if possible else F(0))
    return normalised(products) if any(products) else p


class Combined(Model):
    """A target that a draft is a member of, or other models are, or both."""

    spec: dict
    others: list[Model]

    def __post_init__(self):
        super().__post_init__()
        alone, self.rows = self.target, []

        def target(context: Context) -> Row:
            p, read = alone(context), [other.draft(context) for other in self.others]
            r = combined(self.spec, p, read)
            self.rows.append((p, *read, r))
            return r

        self.target = target


def logits(rows: list[Row]) -> torch.Tensor:
    return torch.tensor([[*map(float, row)] for row in rows], dtype=torch.float64).log()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("rule", ["traversal", "rrs", "match"])
def test_lossless(rule, spec):
    """A step emits r exactly, and `combine` gives every row of it. Rows are shifted, as logits may
    be."""
    target, leaf = parse_target(named(spec)), ()
    for seed in (0, 1):
        model = Combined(3, seed)
        model.spec = spec
        members = [Model(3, 10 * seed + 7 + i) for i in range(len(target.members))]
        model.others = [model] * target.reads_draft + members
        walk = Walk(model, DRAFTING[rule])
        emitted = walk.step(((leaf, leaf), (leaf,)))
        assert sum(emitted.values()) == 1
        assert total_variation(model, emitted, 3) == 0
        p, *others, r = map(logits, zip(*set(model.rows), strict=True))
        parameters = {
            k: torch.tensor(v).double().expand(len(p), np.size(v))
            for k, v in target.parameters.items()
        }
        found = target.combine(p + 3, [q - 2 - i for i, q in enumerate(others)], **parameters)
        torch.testing.assert_close(found.softmax(1), r.exp(), rtol=0, atol=1e-12)


def test_each_row_has_parameters_of_its_own():
    p, q = torch.tensor([[0.0, 2.0, 1.0]]).repeat(3, 1), torch.tensor([[3.0, 0.0, -torch.inf]] * 3)
    weight = torch.tensor([[0.0], [0.5], [1.0]])
    for name in ("mixture", "logits"):
        r = parse_target({"type": name, "weight": 0}).combine(p.clone(), [q], weight=weight)
        ends = torch.stack([p[0], q[0]]).softmax(1)
        torch.testing.assert_close(r[::2].softmax(1), ends)
    beta, alpha = torch.zeros(3, 1), torch.tensor([[0.0], [0.3], [1.0]])
    r = parse_target({"type": "contrastive", "beta": 0, "alpha": 0}).combine(
        p, [q], beta=beta, alpha=alpha
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
    "weight is missing, allowed: a number from 0 to 1, the draft's; or leave it out beside": {
        "type": "mixture",
        "members": [],
    },
    "weights add up to 1.1, allowed: at most 1": named(
        {"type": "mixture", "weight": 0.5, "members": [0.3, 0.3]}
    ),
    "members[0].weight is -0.5, allowed: a number from 0 to 1": named(
        {"type": "mixture", "members": [-0.5]}
    ),
    "members[1] is {'model': 'a'}, allowed: an object with all of: model, a folder or a": {
        "type": "logits",
        "members": [{"model": "b", "weight": 1}, {"model": "a"}],
    },
    "members[0].model is 3, allowed: a folder or a Hugging Face id": {
        "type": "logits",
        "members": [{"model": 3, "weight": 1}],
    },
    "members is 3, allowed: a list of members": {"type": "logits", "members": 3},
    "allowed: a list of one member": named(
        {"type": "contrastive", "beta": 1, "alpha": 0, "members": [None, None]}
    ),
    "members[0].weight is not an option": named(
        {"type": "contrastive", "beta": 1, "alpha": 0, "members": [0.5]}
    ),
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
        ({"target_beta": None}, "target_beta is None, allowed: a number, or leave it out"),
        ({"target_distribution": "mixture"}, "is 'mixture', allowed: 'off'"),
        ({"target_distribution": "off", "target_beta": 1}, "without other keys"),
    ):
        with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
            asked(**extra_args)
        assert message in str(error.value)


def test_what_a_request_may_ask_of_members():
    target = parse_target(named({"type": "mixture", "members": [0.5, 0.25]}))
    assert not target.reads_draft
    assert target.parameters == {"member_weights": [0.5, 0.25]}
    asked = target.of_request({"target_member_weights": [0, 1]})
    assert asked.parameters == {"member_weights": [0, 1]}
    assert [member.model for member in asked.members] == ["model 0", "model 1"]
    for extra_args, message in (
        ({"target_member_weights": [1]}, "is [1], allowed: a list of a number for each of 2"),
        ({"target_member_weights": 1}, "is 1, allowed: a list of a number for each of 2 members"),
        ({"target_member_weights": [0, "1"]}, "_weights[1] is '1', allowed: a number from 0 to 1"),
        ({"target_member_weights": [1, 1]}, "weights add up to 2, allowed: at most 1"),
        ({"target_weight": 0}, "target_weight is not a parameter of target_distribution 'mixture'"),
        ({"target_members": []}, "allowed: target_member_weights"),
    ):
        with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
            target.of_request(extra_args)
        assert message in str(error.value)


def test_every_type_has_a_class():
    assert [TARGETS.load(name).__name__ for name in TARGETS] == [
        "Mixture",
        "LogitSum",
        "Contrastive",
    ]
