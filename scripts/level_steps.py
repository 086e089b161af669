#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Time the steps of trees by level widths beside those of static trees of as many nodes and levels.

Engines take turns, and in every other round in the other order. The median processor time of a
round's steps is divided by that of the static tree's in the same round.
"""

from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from step_times import Setting, steps

from vllm_spechub.measure.benchmark.machine import provenance
from vllm_spechub.measure.benchmark.report import write_table

console = Console()
TREES = {
    "15 nodes, 4 levels": ([0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], "levels:3,4,4,3"),
    "31 nodes, 6 levels": (
        [0, 0, 0, 1, 1, 1, 2, 3, 4, 4, *range(5, 22), 22, 23, 25],
        "levels:3,5,6,6,6,4",
    ),
}
"""The demo pair's best static trees at T = 1, and the same numbers of nodes on each level."""


def main(
    out: Annotated[Path, typer.Argument(help="The CSV file to write.", dir_okay=False)],
    draft: Annotated[list[str], typer.Option(help="A folder of the demo pair.")] = [  # noqa: B006
        "draft",
        "eagle3",
    ],
    rule: Annotated[str, typer.Option(help="The verification rule.")] = "mixed",
    batch: Annotated[list[int], typer.Option("--batch", "-b", help="Requests.")] = [1, 8],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="Tokens for each request.")] = 96,
    rounds: Annotated[int, typer.Option(help="How often each engine has its turn.")] = 3,
) -> None:
    """Measure the demo pair with its draft model and its head."""
    about, rows = provenance(), []
    settings = [Setting(b) for b in batch]
    for each in draft:
        for size, pair in TREES.items():
            ratios: dict[int, list[float]] = {}
            times: dict[int, list[float]] = {}
            for number in range(rounds):
                order = (0, 1) if number % 2 else (1, 0)
                config = {"model": each, "verification": rule}
                found = {
                    place: steps("target", config | {"tree": pair[place]}, settings, tokens)
                    for place in order
                }
                for setting in settings:
                    static, levels = found[0][setting].ms, found[1][setting].ms
                    times.setdefault(setting.batch, []).append(static)
                    ratios.setdefault(setting.batch, []).append(levels / static)
            for b, of_rounds in ratios.items():
                numbers = median(times[b]), median(of_rounds), min(of_rounds), max(of_rounds)
                rows.append([each, size, rule, b, *(f"{number:.3f}" for number in numbers)])
                console.print(*rows[-1])
    header = ["draft", "tree", "rule", "batch", "static_ms", "ratio", "lowest", "highest"]
    write_table(out, about, header, rows)


if __name__ == "__main__":
    typer.run(main)
