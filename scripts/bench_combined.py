#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Measure the demo pair with combined targets at temperature 1: tokens per step and speed of chain
and tree, with and without sharpening, against decoding with the same models plainly.

Speed is by processor time, on one core, so that other work on the machine makes little difference.
Engines take turns, so compare figures within one run, as ratios.
"""

from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from step_times import PAIR, Setting, steps

from vllm_spechub.measure.benchmark.machine import provenance
from vllm_spechub.measure.benchmark.report import write_table

# The demo has no pair of a tuned and an untuned model: the nested draft stands for the latter.
UNTUNED = {"model": str(PAIR / "nested"), "weight": -0.5}
TARGETS: dict[str, dict[str, Any]] = {
    "mixture": {"type": "mixture", "weight": 0.3},
    "logits": {"type": "logits", "weight": 0.5},
    "contrastive": {"type": "contrastive", "beta": 0.5, "alpha": 0.1},
    "proxy tuning": {"type": "logits", "weight": 0.5, "members": [UNTUNED]},
}
TREES = [("none", 1), *((tree, k) for tree in ("chain:3", "binary:3") for k in (1, 2))]
"""Trees, and how sharpened. The first draft nothing."""
HEADER = ["target", "tree", "sharpening", "round", "tokens_per_step", "ms_per_step", "speed"]
console = Console()


def main(
    out: Path = typer.Option(Path("combined.csv"), help="The CSV file to write."),
    batch: int = typer.Option(4, min=1, help="Requests."),
    tokens: int = typer.Option(192, min=8, help="Tokens for each request."),
    rounds: int = typer.Option(3, min=1, help="How often each engine has its turn."),
) -> None:
    """Measure combined targets of the demo pair."""
    about, rows = provenance(), []
    never = [[1, batch, None], [batch + 1, None, "chain:1"]]
    for number in range(rounds):
        for name, target in TARGETS.items():
            plain = 0.0
            for tree, sharpening in TREES:
                config = {"model": "draft", "target_distribution": target}
                shape = {"tree_by_batch_size": never} if tree == "none" else {"tree": tree}
                config |= {**shape, "sharpening": sharpening}
                (found,) = steps("target", config, [Setting(batch)], tokens, number).values()
                speed = found.tokens / found.ms
                plain = plain or speed  # the first of the trees
                numbers = found.tokens, found.ms, speed / plain
                rows.append([name, tree, sharpening, number, *(f"{n:.3f}" for n in numbers)])
                write_table(out, about, HEADER, rows)
        console.print(f"round {number + 1} is measured")
    console.print(out.read_text(encoding="utf-8"), markup=False)


if __name__ == "__main__":
    typer.run(main)
