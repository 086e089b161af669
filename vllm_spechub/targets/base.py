# SPDX-License-Identifier: Apache-2.0
"""`TargetDistribution`, the base class of what two models' rows are combined to."""

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_spechub.registry import TARGETS
from vllm_spechub.trees.validation import Describe, one_line

OPTION = "target_distribution"
"""The key of `--speculative-config`, and of the `extra_args` of a request that wants none."""
PREFIX = "target_"
"""With a parameter's name behind it, the key of `extra_args` that sets the parameter."""
OFF = "off"


def Number(description: str, ge: float | None = None, le: float | None = None) -> Any:
    """A parameter: a finite number, within bounds if there are any."""
    return Field(strict=True, allow_inf_nan=False, description=description, ge=ge, le=le)


class TargetDistribution(BaseModel):
    """How the rows of the target, p, and of another member, q, become the row that is verified, r.

    A subclass declares its parameters as fields, each a number that a request may set.

    Attributes:
        of_processed: whether each member's row is processed by the request's sampling parameters
            before they are combined. Otherwise raw rows are combined, and the result is processed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    of_processed: ClassVar[bool] = False
    type: str
    """The registered name."""

    @property
    def parameters(self) -> dict[str, float]:
        """The values of all parameters by name."""
        return self.model_dump(exclude={"type"})

    @abstractmethod
    def combine(
        self,
        # [num_rows, vocab_size] float32, of the target; -inf where the grammar excludes a token
        p: torch.Tensor,
        # [num_rows, vocab_size] float32, of the other member; -inf also where it lacks a token
        q: torch.Tensor,
        # [num_rows, 1] float32 each, by name
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
        for key in given:
            if key not in names:
                raise ValueError(
                    f"{key} is not a parameter of {OPTION} {self.type!r}, allowed: "
                    f"{', '.join(names)}"
                )
        changed = {key.removeprefix(PREFIX): value for key, value in given.items()}
        try:
            return self.model_validate(self.model_dump() | changed)
        except ValidationError as error:
            raise ValueError(one_line(error, partial(_describe, type(self), PREFIX))) from None


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
    if "members" in spec:
        raise ValueError(
            "members is not supported: the draft model is the only other member; leave it out"
        )
    kind = TARGETS.load(name)
    describe: Describe = partial(_describe, kind, "")
    try:
        return kind.model_validate(spec)
    except ValidationError as error:
        raise ValueError(one_line(error, describe)) from None


def _describe(
    kind: type[TargetDistribution], prefix: str, where: tuple[int | str, ...]
) -> tuple[str, str | None]:
    """What `one_line` asks about a parameter."""
    if not where:  # a parameter is missing
        numbers = {n: f for n, f in kind.model_fields.items() if n != "type"}
        allowed = "; ".join(f"{name}, {field.description}" for name, field in numbers.items())
        return OPTION, f"an object with all of: {allowed}"
    field = kind.model_fields.get(str(where[0]))
    return f"{prefix}{where[0]}", field.description if field else None
