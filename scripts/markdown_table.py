# SPDX-License-Identifier: Apache-2.0
"""Tables for the documents, which cog blocks in the pages ask for.

`cog -r -I scripts README.md docs/*.md` renders them; `scripts/test.sh` checks that they are up to
date.
"""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, with the blank lines that set it off from its cog block's markers."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(["", *(f"| {' | '.join(line)} |" for line in lines), "", ""])
