# SPDX-License-Identifier: Apache-2.0
"""The table of verification rules for the documents."""

from markdown_table import table

from vllm_spechub.triton_kernels.rules import BUILTIN_RULES, DEFAULT_RULE


def rules() -> str:
    """One row for each built-in rule."""
    rows = []
    for rule in BUILTIN_RULES.values():
        name = f"`{rule.name}`" + (" (default)" if rule.name == DEFAULT_RULE else "")
        rows.append([name, rule.summary, rule.source])
    return table(["rule", "what it does", "source"], rows)
