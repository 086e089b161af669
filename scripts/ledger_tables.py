# SPDX-License-Identifier: Apache-2.0
"""The lists of `docs/patches.md`: what is replaced in vLLM, and what else is relied on."""

from itertools import groupby

from markdown_table import table
from vllm_touches import KINDS, stored

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
    """A table of what is relied on of one kind, by the class or module that it belongs to. What is
    not relied on in every version names those in which it is."""
    known = {version: set(facts[kind]) for version, facts in stored().items()}
    if kind == "bodies":  # most functions are in another table already
        for version, facts in stored().items():
            known[version] -= set().union(*(facts[other] for other in KINDS if other != kind))

    def show(name: str) -> str:
        having = [version for version, symbols in known.items() if name in symbols]
        only = f" ({', '.join(having)})" if len(having) < len(known) else ""
        return f"`{name.rpartition('.')[2]}`{only}"

    rows = []
    names = sorted(set().union(*known.values()))
    for owner, members in groupby(names, lambda name: name.rpartition(".")[0]):
        rows.append([f"`{owner}`", ", ".join(map(show, members))])
    return table(["in", "what"], [row for row in rows if row[0] != "``"])
