#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""What the compiler made of the kernels, as a CSV file, and what a step would take by these counts.

    pytest -s tests/kernels/test_compile.py --all-targets > LOG
    python scripts/kernel_figures.py counts OUT < LOG
    python scripts/kernel_figures.py estimate COUNTS...

Nothing is measured here, and no GPU is needed. `counts` keeps what the compiled code says:
registers, spilled and shared bytes, instructions and loads of every loop; from these follow how
many programs fit on a multiprocessor and how many bytes its loads have under way. `estimate` is
arithmetic: instructions by issue rate, bytes by bandwidth, two microseconds for each launch.
"""

import csv
import re
import subprocess
import sys
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
"""Of one multiprocessor; a program takes 1024 more than it uses."""
REGISTERS, MOST_WARPS, MOST_PROGRAMS = 65536, 64, 32
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
STAGES = 3
"""Iterations that an asynchronous loop has under way, the one that is read included."""
LINE = re.compile(
    r"^\.?(?P<kernel>.+), (?P<dtype>\w+), sm_(?P<sm>\d+): Resources\(registers=(?P<registers>\d+), "
    r"spill_bytes=(?P<spill_bytes>\d+), shared_bytes=(?P<shared_bytes>\d+), warps=(?P<warps>\d+), "
    r"loops=\((?P<loops>.*?)\)\)"
)
LOOP = re.compile(r"Loop\(instructions=(\d+), load_bytes=(\d+), is_asynchronous=(\w+)")


def programs_per_multiprocessor(sm: int, registers: int, shared_bytes: int, warps: int) -> int:
    """How many programs of a kernel fit on a multiprocessor at once."""
    per_warp = ceil(registers * 32 / 256) * 256  # allocated in such units
    by_shared = SHARED_BYTES[sm] // (shared_bytes + 1024)
    return min(MOST_PROGRAMS, MOST_WARPS // warps, REGISTERS // (per_warp * warps), by_shared)


def rows_of(line: str) -> list[dict[str, object]]:
    """A printed line of a compilation as rows, one for each loop."""
    found = LINE.match(line)
    if found is None:
        return []
    sm, registers, shared, warps = (
        int(found[name]) for name in ("sm", "registers", "shared_bytes", "warps")
    )
    programs = programs_per_multiprocessor(sm, registers, shared, warps)
    rows = []
    for number, loop in enumerate(LOOP.findall(found["loops"]) or [("", "", "")]):
        instructions, load_bytes, asynchronous = loop
        row: dict[str, object] = {
            "kernel": found["kernel"],
            "dtype": found["dtype"],
            "sm": sm,
            "registers": registers,
            "spill_bytes": int(found["spill_bytes"]),
            "shared_bytes": shared,
            "warps": warps,
            "programs_per_sm": programs,
            "occupancy": round(programs * warps / MOST_WARPS, 3),
            "loop": number if instructions else "",
            "instructions": instructions,
            "loaded_bytes": load_bytes,
            "per_element": "",
            "bytes_in_flight": "",
        }
        if instructions:
            ahead = STAGES - 1 if asynchronous == "True" else 1
            row["bytes_in_flight"] = int(load_bytes) * 32 * warps * programs * ahead
            if found["dtype"] in BYTES:
                elements = int(load_bytes) / BYTES[found["dtype"]]
                row["per_element"] = round(int(instructions) / elements, 2)
        rows.append(row)
    return rows


@app.command()
def counts(
    out: Annotated[Path, typer.Argument(help="The CSV file to write.")],
    kernels: Annotated[str, typer.Option(help="The commit that was compiled.")] = "",
) -> None:
    """Write what a run of the compilations printed, read from standard input."""
    rows = [row for line in sys.stdin for row in rows_of(line)]
    if not rows:
        raise typer.BadParameter("standard input has no line of a compilation; run pytest with -s")
    if not kernels:
        command = ["git", "rev-parse", "--short", "HEAD"]
        kernels = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    with out.open("w", newline="") as file:
        file.write(f"# kernels of commit {kernels}, compiled ahead of time by\n")
        file.write("# pytest -s tests/kernels/test_compile.py --all-targets > LOG; ")
        file.write(f"python scripts/kernel_figures.py counts {out.name} < LOG\n")
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(
            sorted(
                rows, key=lambda row: (str(row["kernel"]), str(row["dtype"]), int(str(row["sm"])))
            )
        )


@dataclass(frozen=True)
class Gpu:
    """An H100 SXM by its data sheet."""

    multiprocessors: int = 132
    hertz: float = 1.755e9
    bytes_per_second: float = 0.9 * 3.35e12
    flops: float = 0.6 * 989e12
    launch: float = 2e-6
    """What starting and draining a kernel takes."""


GPU = Gpu()
VOCAB = 128_256
LEVELS, NODES = (1, 2, 4), 15
"""Nodes with children of `binary:3` by depth, and the tree's nodes with its root."""
CONTEXT = 2048


class Counts:
    """The compiled code of one version of the kernels, for bf16 on sm_90."""

    def __init__(self, file: Path) -> None:
        with file.open() as lines:
            rows = csv.DictReader(line for line in lines if not line.startswith("#"))
            self.rows = [row for row in rows if (row["dtype"], row["sm"]) == ("bf16", "90")]

    def per_element(self, kernel: str, *loops: int) -> float:
        """Instructions for each element of one row, of loops that pass over it."""
        found = [row for row in self.rows if row["kernel"] == kernel and row["loop"]]
        return sum(float(found[loop]["per_element"]) for loop in loops)

    def has(self, kernel: str) -> bool:
        return any(row["kernel"] == kernel for row in self.rows)

    def warps(self, kernel: str) -> int:
        return next(int(row["warps"]) for row in self.rows if row["kernel"] == kernel)

    def resident(self, kernel: str) -> int:
        return next(int(row["programs_per_sm"]) for row in self.rows if row["kernel"] == kernel)

    def seconds(self, kernel: str, instructions: float, programs: int, num_bytes: float) -> float:
        """Of a launch whose programs' threads together run so many instructions each program."""
        warps = self.warps(kernel)
        per_warp = instructions / (32 * warps)
        on_one = ceil(programs / GPU.multiprocessors)
        together = min(on_one, self.resident(kernel)) * warps
        # four schedulers issue one instruction a cycle; a warp alone issues every second one
        cycles = ceil(on_one / self.resident(kernel)) * per_warp * max(2.0, together / 4)
        return GPU.launch + max(cycles / GPU.hertz, num_bytes / GPU.bytes_per_second)


def verification(counts: Counts, batch: int) -> float:
    """Seconds for `traversal` on `binary:3` at temperature 1, top-p off."""
    row = 2.0 * VOCAB
    if not counts.has("statistics"):
        kernel, total = "visit, leaf to root", 0.0
        # loops 1 and 2 sum up both rows, and 3 what is left for the one sample
        per_node = VOCAB * (counts.per_element(kernel, 1, 2) + 2 * counts.per_element(kernel, 3))
        for nodes in LEVELS:
            programs = nodes * batch
            total += counts.seconds(kernel, per_node, programs, 4 * row * programs)
        walk = "walk, leaf to root"
        last = VOCAB * 2 * counts.per_element(walk, 2)
        return total + counts.seconds(walk, last, batch, 2 * row * batch) + 4 * GPU.launch
    splits, small = 16, 3 + len(LEVELS)
    inner = sum(LEVELS)
    both = VOCAB / splits * counts.per_element("statistics", 1, 2)
    total = counts.seconds("statistics", both, splits * inner * batch, 2 * row * inner * batch)
    residual = VOCAB / splits * 2 * counts.per_element("residual", 0)
    for nodes in LEVELS:
        programs = splits * nodes * batch
        total += counts.seconds("residual", residual, programs, 2 * row * nodes * batch)
    total += counts.seconds("residual", residual, splits * batch, 2 * row * batch)  # the race
    return total + small * GPU.launch


def child_sampling(counts: Counts, batch: int) -> float:
    """Seconds for all levels of `binary:3`, rows kept for verification included."""
    total, row = 0.0, 2.0 * VOCAB
    for nodes in LEVELS:
        rows = nodes * batch
        if counts.has("lane sums"):
            per_program = VOCAB / 16 * counts.per_element("lane sums", 0, 1)
            total += counts.seconds("lane sums", per_program, 16 * rows, 3 * row * rows)
            total += 2 * GPU.launch  # drawing the children is two launches' time
        else:
            kernel = next(r["kernel"] for r in counts.rows if r["kernel"].startswith("sample_"))
            per_program = VOCAB * counts.per_element(kernel, 0)
            total += counts.seconds(kernel, per_program, rows, row * rows)
            total += GPU.launch + 2 * row * rows / GPU.bytes_per_second  # the copy
    return total


def models(batch: int) -> float:
    """Seconds of an 8B target over the tree and of a 1B draft's three passes, from weights, caches
    and arithmetic only."""

    def forward(weights: float, cache: float, tokens: int) -> float:
        moved = 2 * weights + cache * CONTEXT * batch
        return max(moved / GPU.bytes_per_second, 2 * weights * tokens / GPU.flops)

    target = forward(8.03e9, 131072, NODES * batch)
    return target + sum(forward(1.24e9, 32768, nodes * batch) for nodes in LEVELS)


@app.command()
def estimate(
    files: Annotated[list[Path], typer.Argument(help="CSV files of `counts`.")],
    out: Annotated[Path | None, typer.Option(help="A CSV file to write.")] = None,
) -> None:
    """Estimate a decode step of an 8B and a 1B model on an H100 SXM. Nothing is measured."""
    rows = []
    for file in files:
        compiled = Counts(file)
        for batch in (1, 8, 64):
            parts = {
                "verification_ms": verification(compiled, batch),
                "child_sampling_ms": child_sampling(compiled, batch),
                "models_ms": models(batch),
            }
            parts["step_ms"] = sum(parts.values())
            rounded = {name: round(1e3 * seconds, 3) for name, seconds in parts.items()}
            rows.append({"counts": file.name, "batch": batch, **rounded})
    table = Table(title="Estimate, not measured: binary:3, traversal, T = 1, vocabulary 128,256")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if out is not None:
        with out.open("w", newline="") as file:
            file.write("# ESTIMATE, not measured: python scripts/kernel_figures.py estimate ")
            file.write(" ".join(file.name for file in files) + "\n")
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    app()
