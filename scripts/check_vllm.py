#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compare everything of vLLM that the plugin relies on with another version of vLLM.

The script reads sources: those in a wheel, in a folder that holds an installed `vllm`, or in the
wheel of a version, which it downloads. It neither installs nor runs them.
"""

import csv
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import typer
from packaging.version import Version
from rich.console import Console
from rich.table import Table
from support_tables import CHECKS
from vllm_source import VllmSource
from vllm_touches import KINDS, Facts, compare, facts, stand_in_problems, store, stored

from vllm_spechub.integration.patch import SUPPORTED_VLLM


def download(version: str, folder: str) -> Path:
    """Download the version's wheel, for any platform that pip finds one for."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "none"]
    command += ["--dest", folder, f"vllm=={version}"]
    subprocess.run(command, check=True)
    return next(Path(folder).glob("vllm-*.whl"))


def changes(found: Facts) -> dict[str, dict[str, str]]:
    """The differences, by kind and symbol."""
    return {
        kind: {symbol: problem for symbol, problem in problems.items() if problem}
        for kind, problems in found.items()
    }


def write_rows(version: str, found: Facts) -> None:
    """Write a version's result into docs/support.csv, replacing an older one."""
    rows = []
    if CHECKS.exists():
        with CHECKS.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["vllm"] != version]
    for kind, differing in changes(found).items():
        rows.append(
            {
                "vllm": version,
                "kind": kind,
                "read": str(len(found[kind])),
                "differ": str(len(differing)),
                "differences": "\n".join(f"{symbol} {text}" for symbol, text in differing.items()),
                "date": date.today().isoformat(),
                "command": f"python scripts/check_vllm.py {version} --record",
            }
        )
    rows.sort(key=lambda row: Version(row["vllm"]))
    with CHECKS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def report(source: str, found: Facts) -> None:
    """Print the number of differences by kind, then each difference."""
    console = Console(soft_wrap=True)
    table = Table(title=f"Sources of vLLM {source}, compared but not run", title_justify="left")
    for column in ("what the plugin relies on", "compared", "different"):
        table.add_column(column, overflow="fold")
    differing = changes(found)
    for kind, description in KINDS.items():
        table.add_row(description, str(len(found[kind])), str(len(differing[kind])))
    console.print(table)
    for kind in KINDS:
        for symbol, problem in differing[kind].items():
            console.print(f"{kind}: {symbol} {problem}", markup=False, highlight=False)


def main(
    source: str = typer.Argument(
        SUPPORTED_VLLM, help="A version to download, a wheel, or a folder that holds `vllm`."
    ),
    record: bool = typer.Option(False, help="Write the result into docs/support.csv."),
    expect: bool = typer.Option(
        False, help="First store this version's signatures as the expected ones."
    ),
) -> None:
    """Compare what the plugin relies on in vLLM with another version, and exit with status 1 if
    anything differs."""
    if record and (Path(source).exists() or source == SUPPORTED_VLLM):
        raise typer.BadParameter("--record needs a version other than the supported one")
    with tempfile.TemporaryDirectory() as folder:
        vllm = VllmSource(Path(source) if Path(source).exists() else download(source, folder))
        if expect:
            store(facts(vllm))
        found = compare(vllm, stored())
    report(source, found)
    unfit = stand_in_problems(stored()["kernels"])
    for kernel, problem in unfit.items():
        print(f"stand-in for {kernel}: {problem}")
    if record:
        write_rows(source, found)
    raise SystemExit(bool(unfit) or any(changes(found).values()))


if __name__ == "__main__":
    typer.run(main)
