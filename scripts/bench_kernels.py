#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Time the kernels and compare them with their memory floor and with vLLM's own, in one run.

Each line of a kernel's CSV file is one setting. First, the kernel's result on new inputs is
compared with the reference's; the run stops if they differ by more than rounding explains. The
columns are: `bytes`, the number of bytes that must be read and written (the kernel's module in
`kernel_benchmarks/` says how they are counted); `floor_us`, the time in which a large copy on the
same device moves as many bytes; `us`, the kernel's median time; `of_floor`, their ratio; and for
each alternative its median time and, as `of_...`, the kernel's time divided by it.

The full grid needs a GPU. On a CPU, only `--quick` runs, with the host versions of the kernels.
"""

import csv
import importlib
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from kernel_benchmarks.measure import Plot, copy_bandwidth, machine, seconds
from kernel_benchmarks.sampling import prepare_platform
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_spechub.measure import preflight
from vllm_spechub.measure.terminal import one_line_errors

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
console = Console(width=None if os.environ.get("COLUMNS") else 110, highlight=False)
HIDDEN = ("bytes", "floor_us")  # only in the CSV files, not in tables
Kernel = StrEnum(
    "Kernel", {name: name for name in ("verification", "child_sampling", "attention", "compaction")}
)
Row = dict[str, Any]


def measure(module, setting: Row, device: torch.device, bandwidth: float) -> Row:
    """Measure one line of the CSV file.

    Raises:
        RuntimeError: the kernel's result differs from the reference's.
    """
    case = module.prepare(setting, device)
    if not case.error <= case.tolerance:
        raise RuntimeError(f"{setting}: error {case.error:g} exceeds {case.tolerance:g}")
    floor = case.num_bytes / bandwidth
    time = seconds(case.run, device)
    row = setting | case.found | {"error": f"{case.error:.2g}", "bytes": case.num_bytes}
    row |= {"floor_us": f"{floor * 1e6:.2f}", "us": f"{time * 1e6:.2f}"}
    row["of_floor"] = f"{time / floor:.2f}" if floor else ""
    for name, run in case.others.items():
        other = seconds(run, device) if run else None
        row[f"{name}_us"] = f"{other * 1e6:.2f}" if other else ""
        row[f"of_{name}"] = f"{time / other:.2f}" if other else ""
    return row


def show(name: str, rows: list[Row]) -> None:
    """Print a table of the columns that vary. Its title has the columns that do not."""
    columns = [key for key in rows[0] if key not in HIDDEN]
    varies = [key for key in columns if len({row[key] for row in rows}) > 1]
    shared = [
        f"{key} {rows[0][key]}" for key in columns if key not in varies and rows[0][key] != ""
    ]
    table = Table(*varies, title=f"{name}: {', '.join(shared)}")
    for row in rows:
        table.add_row(*(str(row[key]) for key in varies))
    console.print(table)


def draw(rows: list[Row], plot: Plot, path: Path) -> None:
    """Plot the time relative to the floor; crosses show the alternatives."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fixed = {}
    for key, value in plot.fixed.items():
        fixed[key] = value if value in {row[key] for row in rows} else rows[-1][key]
    chosen = [row for row in rows if all(row[key] == value for key, value in fixed.items())]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for value in sorted({row[plot.curves] for row in chosen}):
        curve = [row for row in chosen if row[plot.curves] == value]
        x = [row[plot.x] for row in curve]
        floors = [float(row["floor_us"]) for row in curve]
        for column in (key for key in curve[0] if key.endswith("_us") or key == "us"):
            y = [
                float(row[column] or "nan") / floor
                for row, floor in zip(curve, floors, strict=True)
            ]
            if column == "us":
                (line,) = axes.plot(x, y, "o-", label=f"{plot.curves} {value}")
            elif column != "floor_us":
                axes.plot(x, y, "x:", color=line.get_color(), label=f"the same, {column[:-3]}")
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel=plot.x, ylabel="time / floor")
    axes.set_title(", ".join(f"{key} {value}" for key, value in fixed.items()), fontsize=9)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def choose(settings: list[Row], only: list[str]) -> list[Row]:
    """The settings that match every `column=value` in `only`.

    Raises:
        ValueError: the grid does not have this column or value.
    """
    for choice in only:
        column, _, value = choice.partition("=")
        if column not in settings[0]:
            raise ValueError(f"--only {choice}: columns are {', '.join(settings[0])}")
        values = sorted({str(setting[column]) for setting in settings})
        if value not in values:
            raise ValueError(f"--only {choice}: {column} is one of {', '.join(values)}")
        settings = [setting for setting in settings if str(setting[column]) == value]
    return settings


def measure_all(
    name: str, settings: list[Row], device: torch.device, bandwidth: float, path: Path, header: str
) -> list[Row]:
    """Measure all settings of a kernel, and write each to the CSV file at once."""
    module = importlib.import_module(f"kernel_benchmarks.{name}")
    rows: list[Row] = []
    with path.open("w", newline="") as file:
        file.write(header)
        for setting in track(settings, name, console=console):
            try:
                rows.append(measure(module, setting, device, bandwidth))
            except torch.OutOfMemoryError:
                console.print(f"skipped, not enough memory: {setting}")
                torch.cuda.empty_cache()
                continue
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            if len(rows) == 1:
                writer.writeheader()
            writer.writerow(rows[-1])
            file.flush()
    return rows


def main(
    kernels: Annotated[
        list[Kernel] | None, typer.Argument(help="The kernels to measure.", show_default="all")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Measure a small grid.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Measure only settings with this column=value; repeatable."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for the CSV files and plots.")] = Path(
        "docs/benchmarks"
    ),
) -> None:
    """Time the kernels and compare them with their floor and with vLLM's own."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with one_line_errors(Console(stderr=True)):
        if device.type == "cpu" and not quick:
            raise ValueError("the full grid needs a GPU; give --quick on a CPU")
        preflight.check_modules("matplotlib.pyplot")
        preflight.check_output_folder("--out", out)
        modules = {
            name: importlib.import_module(f"kernel_benchmarks.{name}") for name in kernels or Kernel
        }
        settings = {
            name: choose(module.QUICK if quick else module.SETTINGS, only or [])
            for name, module in modules.items()
        }
    prepare_platform(device)
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(device)
    command = " ".join([f"python scripts/{Path(__file__).name}", *sys.argv[1:]])
    header = f"# {command}; {machine(device)}; copy {bandwidth / 1e9:.1f} GB/s\n"
    console.print(header[2:], end="")
    measured: dict[str, list[Row]] = {}
    for name, chosen in settings.items():
        path = out / f"{name}_{device.type}.csv"
        measured[name] = measure_all(name, chosen, device, bandwidth, path, header)
        show(name, measured[name])
    for name, rows in measured.items():
        draw(rows, modules[name].PLOT, out / f"{name}_{device.type}.png")


if __name__ == "__main__":
    typer.run(main)
