#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Time what each rule costs in a step, on the best trees that a study chose for it.

The script reads the trees of `vllm-spechub simulate --out FOLDER`, and times child sampling on all
levels and verification, with this platform's kernels. Rules take turns, and the fastest of all
rounds counts, since whatever else a machine does makes a run slower. On a CPU, only the time of
this process counts. Writes FOLDER/costs.csv, per request; its first line has the command and the
machine.
"""

import csv
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from kernel_benchmarks import child_sampling, verification
from kernel_benchmarks.measure import machine, seconds
from kernel_benchmarks.sampling import prepare_platform
from rich.console import Console
from rich.progress import track

from vllm_spechub.offline.simulation.report import ROWS_CSV, read_csv
from vllm_spechub.offline.simulation.study import Row
from vllm_spechub.trees.tree import TokenTree

COSTS_CSV = "costs.csv"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def main(
    folder: Annotated[Path, typer.Argument(help="The study's folder.", file_okay=False)],
    temperature: Annotated[float, typer.Option("--temperature", "-T")] = 1.0,
    budget: Annotated[int, typer.Option("--nodes", "-n", help="Drafted nodes.")] = 14,
    vocab: Annotated[int, typer.Option(help="The vocabulary's size.")] = 32_000,
    batch: Annotated[int, typer.Option(help="Requests, whose mean counts.")] = 8,
    rounds: Annotated[int, typer.Option(help="How often each rule has its turn.")] = 5,
) -> None:
    """Time child sampling and verification with each rule."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    prepare_platform(device)
    torch.manual_seed(0)
    rows = [
        row
        for row in read_csv(Row, folder / ROWS_CSV)
        if (row.temperature, row.budget) == (temperature, budget) and row.kind.startswith("best")
    ]
    setting = {"vocab": vocab, "dtype": "fp32", "temperature": temperature, "top_p": 1.0}
    cases = {}
    for row in rows:
        tree, of_rule = TokenTree(row.tree), setting | {"rule": row.rule, "batch": batch}
        levels = range(len(tree.level_sizes) - 1)
        cases[row] = (
            [child_sampling.prepare(of_rule, device, tree, depth).run for depth in levels],
            [verification.prepare(of_rule, device, tree).run],
        )
    fastest: dict[tuple[Row, int], float] = defaultdict(lambda: float("inf"))
    for _ in track(range(rounds), "timing", console=Console(stderr=True)):
        for row, parts in cases.items():
            for part, runs in enumerate(parts):
                spent = sum(seconds(run, device, "min", time.process_time) for run in runs)
                fastest[row, part] = min(fastest[row, part], spent / batch)
    with (folder / COSTS_CSV).open("w", newline="", encoding="utf-8") as file:
        command = " ".join([f"python scripts/{Path(__file__).name}", *sys.argv[1:]])
        file.write(f"# {command}; {machine(device)}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kind", "rule", "tokens_per_step", "sampling_us", "verification_us"])
        for row in rows:
            times = (f"{fastest[row, part] * 1e6:.0f}" for part in (0, 1))
            writer.writerow([row.kind, row.rule, row.tokens_per_step, *times])


if __name__ == "__main__":
    typer.run(main)
