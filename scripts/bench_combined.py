#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Measure the demo pair with combined targets at temperature 1: tokens per step of chain and tree,
with and without sharpening. `scripts/bench_e2e.py --config` measures their speed.
"""

import csv
from pathlib import Path

import typer
from bench_exits import measure
from rich.console import Console

from vllm_spechub.measure.benchmark.machine import provenance

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
                drafts = [run.drafts for run in runs]
                each = [1 + sum(run.accepted_by_depth) / run.drafts for run in runs]
                emitted = sum(n * x for n, x in zip(drafts, each, strict=True)) / sum(drafts)
                spread = f"{min(each):.3f}", f"{max(each):.3f}"
                rows.append([target["type"], tree, sharpening, f"{emitted:.3f}", *spread])
    header = ["target", "tree", "sharpening", "tokens_per_step", "lowest", "highest"]
    with out.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {line}\n" for line in about)
        csv.writer(file).writerows([header, *rows])
    console.print(out.read_text(), markup=False)


if __name__ == "__main__":
    typer.run(main)
