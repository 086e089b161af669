#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Measure both demo targets with the nested draft at several depths, with the plain draft, and with
early exits: tokens per step, and speed beside plain vLLM's.

Speed is by processor time, on one core, so that other work on the machine makes little difference.
Engines take turns, so compare figures within one run, as ratios.
"""

from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from step_times import Setting, steps

from vllm_spechub.measure.benchmark.machine import provenance
from vllm_spechub.measure.benchmark.report import write_table

NESTED = {f"nested draft, {k} layers": {"model": "nested", "draft_layers": k} for k in (3, 6, 12)}
DRAFTS = NESTED | {"plain draft, 12 layers": {"model": "draft"}}
EXITS = {f"early exit, {k} layers": {"proposer": "early_exit", "exit_layer": k} for k in (2, 4)}
METHODS: dict[str, dict[str, dict[str, Any]]] = {"target": DRAFTS, "exit_target": EXITS | DRAFTS}
HEADER = ["target", "draft", "temperature", "round", "tokens_per_step", "ms_per_step", "speed"]
console = Console()


def main(
    out: Path = typer.Option(Path("exits.csv"), help="The CSV file to write."),
    tree: str = typer.Option("binary:3", help="The tree."),
    batch: int = typer.Option(4, min=1, help="Requests."),
    tokens: int = typer.Option(160, min=8, help="Tokens for each request."),
    rounds: int = typer.Option(3, min=1, help="How often each engine has its turn."),
) -> None:
    """Measure both demo targets with drafts of several depths."""
    about, rows = provenance(), []
    settings = [Setting(batch, temperature) for temperature in (0.0, 1.0)]
    for number in range(rounds):
        for target, drafts in METHODS.items():
            plain = steps(target, None, settings, tokens, number)
            for name, options in ({"plain": None} | drafts).items():
                found = plain
                if options is not None:
                    found = steps(target, {"tree": tree} | options, settings, tokens, number)
                for setting, own in found.items():
                    speed = own.tokens / own.ms * plain[setting].ms
                    numbers = (f"{n:.3f}" for n in (own.tokens, own.ms, speed))
                    rows.append([target, name, setting.temperature, number, *numbers])
                write_table(out, about, HEADER, rows)
        console.print(f"round {number + 1} is measured")
    console.print(out.read_text(encoding="utf-8"), markup=False)


if __name__ == "__main__":
    typer.run(main)
