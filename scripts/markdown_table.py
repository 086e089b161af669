# SPDX-License-Identifier: Apache-2.0
"""Tables for the documents, whose pages call this from cog blocks.

`cog -r -I scripts README.md docs/*.md` renders them; `scripts/test.sh` checks that they are up to
date.
"""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, between blank lines that separate it from its cog block's markers."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(["", *(f"| {' | '.join(line)} |" for line in lines), "", ""])
