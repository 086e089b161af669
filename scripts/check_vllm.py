#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Does every symbol that the plugin patches still look as expected in another vLLM?

Reads a wheel, the folder that holds an installed `vllm`, or downloads the wheel of a version;
installs nothing.
"""

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import typer
from packaging.version import Version
from rich.console import Console
from rich.table import Table
from support_tables import CHECKS
from vllm_source import check_source, reader

from vllm_spechub.integration import patches
from vllm_spechub.integration.patch import SUPPORTED_VLLM


def download(version: str, folder: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "none"]
    command += ["--dest", folder, f"vllm=={version}"]
    subprocess.run(command, check=True)
    return next(Path(folder).glob("vllm-*.whl"))


def write_row(version: str, symbols: int, changed: dict[str, str]) -> None:
    """Put a version's result into docs/support.csv, in place of an older one."""
    row = {
        "vllm": version,
        "symbols": str(symbols),
        "as_expected": str(symbols - len(changed)),
        "changed": "; ".join(f"`{symbol}` {problem}" for symbol, problem in changed.items()),
        "command": f"python scripts/check_vllm.py {version} --record",
    }
    rows = {}
    if CHECKS.exists():
        with CHECKS.open(newline="", encoding="utf-8") as file:
            rows = {old["vllm"]: old for old in csv.DictReader(file)}
    rows[version] = row
    with CHECKS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows.values(), key=lambda row: Version(row["vllm"])))


def main(
    source: str = typer.Argument(
        SUPPORTED_VLLM, help="A wheel, a folder that holds `vllm`, or a version to download."
    ),
    record: bool = typer.Option(False, help="Write a version's result into docs/support.csv."),
) -> None:
    if record and Path(source).exists():
        raise typer.BadParameter("--record needs a version, not a wheel or a folder")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(source) if Path(source).exists() else download(source, folder)
        found = check_source(patches.ALL, reader(path))
    table = Table(title=f"patched symbols in {source}", title_justify="left")
    table.add_column("symbol", overflow="fold")
    table.add_column("state", overflow="fold")
    for symbol, problem in found.items():
        table.add_row(symbol, problem or "as expected")
    Console().print(table)
    changed = {symbol: problem for symbol, problem in found.items() if problem}
    print(f"{len(found) - len(changed)} of {len(found)} symbols are as expected")
    if record:
        write_row(source, len(found), changed)
    raise SystemExit(bool(changed))


if __name__ == "__main__":
    typer.run(main)
