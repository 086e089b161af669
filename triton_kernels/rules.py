# SPDX-License-Identifier: Apache-2.0
"""The verification rules by name: how children are drafted, and how a tree of them is accepted.

Drafting and verification are the two halves of one law, so both take the same `rule`:

- `ordered`, `unordered`: SpecHub (Sun et al., EMNLP 2024, arXiv 2411.05289), from root to leaf.
- `traversal`: SpecHub's drafts as `ordered` lays them out, from leaf to root.
- `rrs`: children drawn independently (SpecInfer, arXiv 2305.09781), recursive rejection.
- `rrsw`: children drawn without replacement (Sequoia, arXiv 2402.12374), recursive rejection.
- `chain`: one child per node, standard rejection (arXiv 2211.17192).
"""

SPECHUB = ("ordered", "unordered", "traversal")
"""Rules whose nodes draft hubs and one sampled child, which `sharpening` may sharpen."""
RECURSIVE = ("rrs", "rrsw")
"""Rules whose children are all drawn from the draft and tried one after the other."""
RULES = (*SPECHUB, *RECURSIVE, "chain")
DEFAULT_RULE = "traversal"
"""The rule that emits most tokens per step, measured in docs/verification.md."""

ORDERED_SLOTS = ("ordered", "traversal")
"""Rules that draft into slot 0 a token distributed as the draft; see `sample_children`."""


def check_rule(rule: str, sharpening: float, max_children: int) -> None:
    """Raise a ValueError that names the argument unless the three go together."""
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}, allowed: {', '.join(RULES)}")
    if not 0.0 < sharpening < float("inf"):
        raise ValueError(f"sharpening is {sharpening}, allowed: a finite number above 0")
    if sharpening != 1.0 and rule not in SPECHUB:
        raise ValueError(
            f"sharpening must be 1 with rule {rule!r}, allowed with: {', '.join(SPECHUB)}"
        )
    if rule == "chain" and max_children > 1:
        raise ValueError("rule 'chain' takes one child per node")
