#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Does every symbol that the plugin patches still look as expected in another vLLM?

Reads a wheel, the folder that holds an installed `vllm`, or downloads the wheel of a version;
installs nothing.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from vllm_spechub.patches import SUPPORTED_VLLM, ledger
from vllm_spechub.patches.wheel import check_source, reader


def download(version: str, folder: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "none"]
    command += ["--dest", folder, f"vllm=={version}"]
    subprocess.run(command, check=True)
    return next(Path(folder).glob("vllm-*.whl"))


def main(
    source: str = typer.Argument(
        SUPPORTED_VLLM, help="A wheel, a folder that holds `vllm`, or a version to download."
    ),
) -> None:
    patches = (*ledger.EVERYWHERE, *ledger.WORKER, *ledger.CPU_WORKER)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(source) if Path(source).exists() else download(source, folder)
        found = check_source(patches, reader(path))
    table = Table(title=f"patched symbols in {source}", title_justify="left")
    table.add_column("symbol", overflow="fold")
    table.add_column("state", overflow="fold")
    for symbol, problem in found.items():
        table.add_row(symbol, problem or "as expected")
    Console().print(table)
    changed = sum(bool(problem) for problem in found.values())
    print(f"{len(found) - changed} of {len(found)} symbols are as expected")
    raise SystemExit(bool(changed))


if __name__ == "__main__":
    typer.run(main)
