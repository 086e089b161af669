# SPDX-License-Identifier: Apache-2.0
"""Pydantic's errors as one line that names the value and what is allowed."""

from collections.abc import Callable

from pydantic import ValidationError

Describe = Callable[[tuple[int | str, ...]], tuple[str, str | None]]
"""A function from a value's place, as keys and indices, to the value's name and to what is allowed.
None in place of the latter leaves it to pydantic's own words."""


def one_line(error: ValidationError, describe: Describe) -> str:
    """Describe the first error to users, in one line.

    Returns:
        "NAME: the message" for the ValueErrors of our own validators, which say everything, and
        "NAME is VALUE, allowed: ..." for pydantic's.
    """
    first = error.errors(include_url=False)[0]
    kind, where = first["type"], first["loc"]
    # pydantic names the missing part of a value, and the value as its input
    name, allowed = describe(where[:-1] if kind == "missing" else where)
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{name} is not an option"
    if kind == "value_error":
        return f"{name}: {first['msg'].removeprefix('Value error, ')}"
    allowed = allowed or first["msg"].removeprefix("Input should be ")
    return f"{name} is {first['input']!r}, allowed: {allowed}"
