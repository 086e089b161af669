# SPDX-License-Identifier: Apache-2.0
"""`TargetDistribution`, the base class of what several models' rows are combined to."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_spechub.registry import TARGETS
from vllm_spechub.trees.validation import Describe, one_line

OPTION = "target_distribution"
"""The key of `--speculative-config`, and of the `extra_args` of a request that wants none."""
PREFIX = "target_"
"""With a parameter's name behind it, the key of `extra_args` that sets the parameter."""
OFF = "off"
MEMBERS, MEMBER_WEIGHTS = "members", "member_weights"


def Number(
    description: str, ge: float | None = None, le: float | None = None, default: Any = ...
) -> Any:
    """A parameter: a finite number, within bounds if there are any. Without a default it is
    needed."""
    return Field(default, strict=True, allow_inf_nan=False, description=description, ge=ge, le=le)


class Member(BaseModel):
    """A model beside target and draft whose rows are combined with the target's.

    Its options are those of a draft of the same names.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(strict=True, min_length=1, description="a folder or a Hugging Face id")
    quantization: str | None = None
    revision: str | None = None
    code_revision: str | None = None


class TargetDistribution(BaseModel):
    """How the rows of the target, p, and of other models, q, become the row that is verified, r.

    A subclass declares its parameters as fields, each a number that a request may set. Unless it
    says otherwise, there is one other model: the draft, or the only member in its place.

    Attributes:
        of_processed: whether each model's row is processed by the request's sampling parameters
            before they are combined. Otherwise raw rows are combined, and the result is processed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    of_processed: ClassVar[bool] = False
    type: str
    """The registered name."""
    members: tuple[Member, ...] = Field((), max_length=1, description="a list of one member")
    """Models that are read beside target and draft."""

    @property
    def parameters(self) -> dict[str, float | list[float]]:
        """The values of all parameters by name."""
        return self.model_dump(exclude={"type", MEMBERS}, exclude_none=True)

    @property
    def reads_draft(self) -> bool:
        """Whether the draft's rows are combined, too, so that the draft must be a model that runs
        by itself."""
        return not self.members

    @property
    def num_others(self) -> int:
        """How many models' rows are combined with the target's."""
        return self.reads_draft + len(self.members)

    def check(self) -> None:
        """Check parameters that depend on each other.

        Raises:
            ValueError: one line that names a parameter and what is allowed.
        """

    @abstractmethod
    def combine(
        self,
        # [num_rows, vocab_size] float32, of the target; -inf where the grammar excludes a token
        p: torch.Tensor,
        # [num_rows, vocab_size] float32 each, of the draft, if it is read, and then of each member;
        # -inf also where the model lacks a token
        others: Sequence[torch.Tensor],
        # [num_rows, 1] float32 each, by name; [num_rows, num_members] if it has a number for each
        **parameters: torch.Tensor,
    ) -> torch.Tensor:
        """Combine rows of logits. A row in which nothing would be left must be p's.

        Returns:
            Logits [num_rows, vocab_size] float32.
        """

    def of_request(self, extra_args: Mapping[str, Any] | None) -> "TargetDistribution | None":
        """The distribution with the parameters that a request's `extra_args` set; None if the
        request wants the target's own.

        Raises:
            ValueError: one line that names the key and what is allowed.
        """
        given = {k: v for k, v in (extra_args or {}).items() if str(k).startswith(PREFIX)}
        if not given:
            return self
        wanted = given.pop(OPTION, None)
        if wanted not in (None, OFF) or (wanted and given):
            raise ValueError(
                f"{OPTION} is {wanted!r}, allowed: 'off', without other keys of {PREFIX}*"
            )
        if wanted:
            return None
        names = [f"{PREFIX}{name}" for name in self.parameters]
        for key, value in given.items():
            if key not in names:
                raise ValueError(
                    f"{key} is not a parameter of {OPTION} {self.type!r}, allowed: "
                    f"{', '.join(names)}"
                )
            if value is None:  # which would take the draft out
                raise ValueError(f"{key} is None, allowed: a number, or leave it out")
        changed = {key.removeprefix(PREFIX): value for key, value in given.items()}
        members, weights = self.model_dump()[MEMBERS], changed.pop(MEMBER_WEIGHTS, None)
        if weights is not None:
            if not isinstance(weights, list) or len(weights) != len(members):
                raise ValueError(
                    f"{PREFIX}{MEMBER_WEIGHTS} is {weights!r}, allowed: a list of a number for "
                    f"each of {len(members)} members"
                )
            changed[MEMBERS] = [
                member | {"weight": weight} for member, weight in zip(members, weights, strict=True)
            ]
        return _validated(type(self), self.model_dump() | changed, PREFIX)


def parse_target(spec: Any) -> TargetDistribution:
    """Build the distribution from an object of options.

    Raises:
        ValueError: one line that names the key and what is allowed.
    """
    name = spec.get("type") if isinstance(spec, Mapping) else None
    if not isinstance(name, str) or name not in TARGETS:
        raise ValueError(
            f"type is {name!r}, allowed: an object with a type of {', '.join(TARGETS)}, such as "
            '{"type": "mixture", "weight": 0.3}'
        )
    return _validated(TARGETS.load(name), spec, "")


def _validated(
    kind: type[TargetDistribution], values: Mapping[str, Any], prefix: str
) -> TargetDistribution:
    describe: Describe = partial(_describe, kind, prefix)
    try:
        target = kind.model_validate(values)
    except ValidationError as error:
        raise ValueError(one_line(error, describe)) from None
    target.check()
    return target


def _describe(
    kind: type[TargetDistribution], prefix: str, where: tuple[int | str, ...]
) -> tuple[str, str | None]:
    """What `one_line` asks about a parameter."""
    described: type[BaseModel] = kind
    name, rest = OPTION, where
    if len(where) > 1:  # in one of the members
        described, _ = get_args(kind.model_fields[MEMBERS].annotation)
        _, number, *rest = where
        name = f"{MEMBERS}[{number}]"
        if prefix:  # a request sets nothing else of a member
            name = f"{prefix}{MEMBER_WEIGHTS}[{number}]"
        elif rest:
            name = f"{name}.{rest[0]}"
    elif where:
        name = f"{prefix}{where[0]}"
    if rest:
        field = described.model_fields.get(str(rest[0]))
        return name, field.description if field else None
    needed = {n: f for n, f in described.model_fields.items() if n != "type" and f.is_required()}
    allowed = "; ".join(f"{name}, {field.description}" for name, field in needed.items())
    return name, f"an object with all of: {allowed}"
