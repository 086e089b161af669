#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Measure the demo pair with combined targets at temperature 1: tokens per step of chain and tree,
with and without sharpening. `scripts/bench_e2e.py --config` measures their speed.
"""

from pathlib import Path

import typer
from bench_exits import measure
from rich.console import Console

from vllm_spechub.measure.benchmark.machine import provenance
from vllm_spechub.measure.benchmark.report import write_table

TARGETS = (
    {"type": "mixture", "weight": 0.3},
    {"type": "logits", "weight": 0.5},
    {"type": "contrastive", "beta": 0.5, "alpha": 0.1},
)
console = Console()


def main(
    out: Path = typer.Option(Path("combined.csv"), help="The CSV file to write."),
    batch: int = typer.Option(4, min=1, help="Requests."),
    tokens: int = typer.Option(96, min=4, help="Tokens to count for each request."),
    repetitions: int = typer.Option(3, min=1, help="Repetitions, each with other prompts."),
) -> None:
    """Measure combined targets of the demo pair."""
    about, rows = provenance(), []
    for target in TARGETS:
        for tree in ("chain:3", "binary:3"):
            for sharpening in (1, 2):
                options = {"model": "draft", "target_distribution": target}
                options["sharpening"] = sharpening
                runs = measure("target", options, tree, batch, tokens, repetitions)[1.0]
                each = [1 + sum(run.accepted_by_depth) / run.drafts for run in runs]
                accepted = sum(sum(run.accepted_by_depth) for run in runs)
                emitted = 1 + accepted / sum(run.drafts for run in runs)
                spread = f"{min(each):.3f}", f"{max(each):.3f}"
                rows.append([target["type"], tree, sharpening, f"{emitted:.3f}", *spread])
    header = ["target", "tree", "sharpening", "tokens_per_step", "lowest", "highest"]
    write_table(out, about, header, rows)
    console.print(out.read_text(), markup=False)


if __name__ == "__main__":
    typer.run(main)
