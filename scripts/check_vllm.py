#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compare everything of vLLM that the plugin relies on with what is stored of supported versions.

The script reads sources: those in a wheel, in a folder that holds an installed `vllm`, or in the
wheel of a version, which it downloads. It neither installs nor runs them.
"""

import tempfile
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from vllm_source import VllmSource, download
from vllm_touches import KINDS, Facts, Sources, compare, facts, stand_in_problems, store, stored

from vllm_spechub.integration.versions import MODULES, supported


def report(title: str, found: Facts) -> bool:
    """Print how many differences there are by kind, then each. Returns whether there are any."""
    console = Console(soft_wrap=True)
    table = Table(title=title, title_justify="left")
    for column in ("what the plugin relies on", "compared", "different"):
        table.add_column(column, overflow="fold")
    differing = {kind: {k: v for k, v in problems.items() if v} for kind, problems in found.items()}
    for kind, description in KINDS.items():
        table.add_row(description, str(len(found[kind])), str(len(differing[kind])))
    console.print(table)
    for kind in KINDS:
        for symbol, problem in differing[kind].items():
            console.print(f"{kind}: {symbol} {problem}", markup=False, highlight=False)
    return any(differing.values())


def main(
    source: str = typer.Argument(
        help="A version to download, a wheel, or a folder that holds `vllm`."
    ),
    expect: bool = typer.Option(
        False, help="First store what a supported version looks like as what is expected of it."
    ),
) -> None:
    """Compare a supported version with what is stored of it, or another version with the newest
    supported one. Exits with status 1 if anything differs."""
    with tempfile.TemporaryDirectory() as folder:
        vllm = VllmSource(Path(source) if Path(source).exists() else download(source, folder))
        version = vllm.version
        if expect and version not in MODULES:
            raise typer.BadParameter(f"this is vLLM {version}, supported: {supported()}")
        if expect:
            store(version, facts(vllm, Sources(version=version)))
        reference = version if version in MODULES else [*MODULES][-1]
        found = compare(vllm, stored()[reference])
    differs = report(f"vLLM {version}, compared with {reference}; not run", found)
    unfit = stand_in_problems(reference, stored()[reference]["kernels"])
    for kernel, problem in unfit.items():
        print(f"stand-in for {kernel}: {problem}")
    raise SystemExit(differs or bool(unfit))


if __name__ == "__main__":
    typer.run(main)
