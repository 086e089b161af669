#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Measure both demo targets with the nested draft at several depths, with the plain draft, and with
early exits: tokens per step, and speed beside plain vLLM's. Engines take turns, so compare figures
within one run, as ratios. What was measured is written as it is measured.
"""

import os
from contextlib import closing
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from vllm_spechub.drafts.sources import Sources
from vllm_spechub.measure import preflight
from vllm_spechub.measure.benchmark.interleaved import (
    Failure,
    Interleaved,
    Point,
    Row,
    Setup,
    encode,
)
from vllm_spechub.measure.benchmark.machine import provenance
from vllm_spechub.measure.benchmark.methods import Method, plain
from vllm_spechub.measure.benchmark.report import summarize, table, write_csv
from vllm_spechub.measure.terminal import one_line_errors
from vllm_spechub.offline.simulation.texts import read_prompts

PAIR = Path(__file__).parent / "demo_pair"
NESTED = {f"nested draft, {k} layers": {"model": "nested", "draft_layers": k} for k in (3, 6, 12)}
DRAFTS = NESTED | {"plain draft, 12 layers": {"model": "draft"}}
EXITS = {f"early exit, {k} layers": {"proposer": "early_exit", "exit_layer": k} for k in (2, 4)}
METHODS: dict[str, dict[str, dict[str, Any]]] = {"target": DRAFTS, "exit_target": EXITS | DRAFTS}
console = Console(width=None if os.environ.get("COLUMNS") else 120, highlight=False)


def compared(target: str, tree: str) -> list[Method]:
    """Plain vLLM and everything that drafts for a target."""
    found = [plain()]
    for name, options in METHODS[target].items():
        config = {"method": "spechub", "tree": tree} | options
        if "model" in options:
            config["model"] = str(PAIR / options["model"])
        found.append(Method(name, config))
    return found


def main(
    out: Path = typer.Option(Path("exits"), help="The folder for a CSV file for each target."),
    tree: str = typer.Option("binary:3", help="The tree."),
    batch: int = typer.Option(4, min=1, help="Requests."),
    tokens: int = typer.Option(96, min=4, help="Tokens to time for each request."),
    repetitions: int = typer.Option(6, min=1, help="Repetitions, each with other prompts."),
    resident: int = typer.Option(3, min=2, help="Engines that run at once, plain vLLM's included."),
) -> None:
    """Measure both demo targets with drafts of several depths."""
    with one_line_errors(console):
        preflight.check_output_folder("--out", out)
        about = provenance()
        for target in METHODS:
            # every engine has room for the largest draft
            sources = Sources(str(PAIR / target), str(PAIR / "nested"), {"dtype": "float32"})
            prompts = encode(sources, read_prompts(PAIR / "prompts.jsonl"))
            points = [Point(batch, temperature) for temperature in (0.0, 1.0)]
            interleaved = Interleaved(
                Setup(sources, prompts, tokens, resident),
                compared(target, tree),
                points,
                range(repetitions),
                report=console.print,
            )
            rows: list[Row] = []
            with closing(interleaved.measure()) as results:
                for result in results:
                    if isinstance(result, Failure):
                        raise ValueError(f"{result.method} failed:\n{result.log}")
                    rows.append(result)
                    write_csv(rows, out / f"{target}.csv", about)
            console.print(table(summarize(rows)))


if __name__ == "__main__":
    typer.run(main)
