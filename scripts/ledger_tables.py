# SPDX-License-Identifier: Apache-2.0
"""The lists of `docs/patches.md`: what is replaced in vLLM, and what else is relied on."""

from itertools import groupby

from markdown_table import table
from vllm_touches import stored

from vllm_spechub.integration.patch import Patch


def ledger(patches: tuple[Patch, ...]) -> str:
    """A section for every replaced symbol."""
    lines = []
    for patch in patches:
        lines += [
            "",
            f"### `{patch.symbol}`",
            "",
            f"- parameters: `({', '.join(patch.parameters)})`",
            f"- why: {patch.why}",
            f"- how: {patch.how}",
            f"- upstream: {patch.upstream}",
            f"- can be removed when: {patch.until}",
        ]
    return "\n".join([*lines, "", ""])


def relied_on(kind: str) -> str:
    """A table of what is relied on of one kind, by the class or module that it belongs to."""
    rows = []
    for owner, names in groupby(sorted(stored()[kind]), lambda name: name.rpartition(".")[0]):
        rows.append([f"`{owner}`", ", ".join(f"`{name.rpartition('.')[2]}`" for name in names)])
    return table(["in", "what"], [row for row in rows if row[0] != "``"])
