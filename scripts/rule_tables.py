# SPDX-License-Identifier: Apache-2.0
"""The tables of verification rules for the documents."""

from markdown_table import table

from vllm_spechub.triton_kernels.constants import CONFIDENT
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES, DEFAULT_RULE, Hubs

HUBS = {
    Hubs.NONE: "none",
    Hubs.CONFIDENT: f"those with `q > {CONFIDENT}`, at least 1, at most `k - 1`; none if `k = 1`",
    Hubs.ALL_BUT_ONE: "`k - 1`",
    Hubs.ALL: "`k`",
}


def rules() -> str:
    """One row for each built-in rule: what it does."""
    rows = []
    for rule in BUILTIN_RULES.values():
        name = f"`{rule.name}`" + (" (default)" if rule.name == DEFAULT_RULE else "")
        rows.append([name, rule.summary, rule.source])
    return table(["rule", "what it does", "source"], rows)


def slots() -> str:
    """One row for each built-in rule: how it drafts a node's `k` children and verifies them."""
    rows = [
        [f"`{rule.name}`", HUBS[rule.hubs], rule.samples, rule.direction, rule.subtrees]
        for rule in BUILTIN_RULES.values()
    ]
    return table(["rule", "hubs of `k` children", "samples", "direction", "subtrees"], rows)
