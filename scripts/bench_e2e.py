#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compare plain vLLM, its draft-model chain and SpecHub end to end, on models of your own.

    python scripts/bench_e2e.py TARGET --draft DRAFT --prompts FILE
    python scripts/bench_e2e.py --make-pair 8b:1b:0.7   # no weights at hand: makes a pair first
    python scripts/bench_e2e.py                         # the demo pair

All requests of a batch decode from the first timed step to the last. Engines take turns, so that
compare within one run, as ratios. Writes measurements.csv and speed.png into a folder.
"""

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_spechub.measure.benchmark import report, methods
from vllm_spechub.measure.benchmark.engine import EngineFailed
from vllm_spechub.measure.benchmark.interleaved import (
    Failure,
    Interleaved,
    Point,
    Row,
    Setup,
    encode,
)
from vllm_spechub.measure.benchmark.machine import provenance

SCRIPTS = Path(__file__).parent
DEMO, MAKE_PAIR = SCRIPTS / "demo_pair", SCRIPTS / "make_pair.py"
AS_MANY = 14
"""Tokens that SpecHub drafts by default: the length of the chain whose steps compare with its."""
CHAINS = (*range(1, 9), AS_MANY)
DEMO_ENGINE = {"dtype": "float32"}
console = Console(width=None if os.environ.get("COLUMNS") else 120, highlight=False)


def made_pair(spec: str) -> Path:
    """The folder of a pair of random models, made unless it is there."""
    parts = spec.split(":")
    if len(parts) != 3:
        raise typer.BadParameter(f"--make-pair is {spec!r}, not TARGET:DRAFT:OVERLAP")
    folder = Path.home() / ".cache" / "vllm-spechub" / "-".join(["pair", *parts])
    if not (folder / "card.json").exists():
        target, draft, overlap = parts
        options = ["--target", target, "--draft", draft, "--overlap", overlap]
        # in a process of its own, which leaves nothing on a GPU that engines are forked for
        made = subprocess.run([sys.executable, MAKE_PAIR, folder, *options])
        if made.returncode:
            raise SystemExit(made.returncode)
    return folder


def files_of(pair: Path) -> tuple[str, str, Path]:
    """Target, draft and prompts of a folder that has all three."""
    return str(pair / "target"), str(pair / "draft"), pair / "prompts.jsonl"


def compared(target: str, draft: str, chains: list[int], trees: list[str]) -> list[methods.Method]:
    """Everything that is measured; `auto` if its schedule is known."""
    from vllm_spechub.trees.measured_schedule import measured_schedule
    from vllm_spechub.triton_kernels.rules import DEFAULT_RULE

    found = [methods.plain(), *(methods.chain(draft, length) for length in chains)]
    found += [methods.spechub("SpecHub", draft)]
    for tree in trees:
        shape = json.loads(tree) if tree.startswith("[") else tree
        found.append(methods.spechub(f"SpecHub {tree}", draft, tree=shape))
    try:
        measured_schedule(target, draft, DEFAULT_RULE)
        found.append(methods.spechub("SpecHub auto", draft, tree_by_batch_size="auto"))
    except ValueError as error:
        console.print(f"without SpecHub auto: {error}", markup=False)
    return found


def steps_compared(summaries: dict[Point, dict[str, report.Summary]]) -> str:
    """SpecHub's step over a chain's that drafts as many tokens."""
    ratios = [
        f"{found['SpecHub'].ms_per_step / chain.ms_per_step:.2f} "
        f"(batch {point.batch}, T = {point.temperature:g})"
        for point, found in summaries.items()
        if "SpecHub" in found and (chain := found.get(f"chain {AS_MANY}"))
    ]
    return f"a SpecHub step over one of a chain of {AS_MANY}: {', '.join(ratios) or 'not measured'}"


def main(
    target: Annotated[str | None, typer.Argument(help="A folder or a Hugging Face id.")] = None,
    draft: Annotated[str | None, typer.Option(help="Its draft.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with `turns` or `prompt`, or text by lines.")
    ] = None,
    make_pair: Annotated[
        str | None, typer.Option(help="TARGET:DRAFT:OVERLAP, shapes of scripts/make_pair.py.")
    ] = None,
    batch: Annotated[list[int], typer.Option("--batch", "-b", min=1)] = (1, 4, 16, 64),
    temperature: Annotated[list[float], typer.Option("--temperature", "-T", min=0.0)] = (
        0.0,
        0.6,
        1.0,
    ),
    chain: Annotated[
        list[int], typer.Option("--chain", "-K", min=1, help="Chain lengths.")
    ] = CHAINS,
    tree: Annotated[list[str], typer.Option(help="More trees to compare, as `tree` has it.")] = (),
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to time for each request.")] = 128,
    repetitions: Annotated[int, typer.Option(min=1)] = 3,
    resident: Annotated[
        int | None,
        typer.Option(min=1, help="Engines at once.", show_default="all on the CPU, else 3"),
    ] = None,
    engine: Annotated[str, typer.Option(help="Further engine options, as JSON.")] = "{}",
    out: Annotated[Path, typer.Option(help="Folder for CSV and plot.")] = Path("bench_e2e"),
) -> None:
    from vllm_spechub.offline.simulation.texts import read_prompts

    options = json.loads(engine)
    if make_pair is not None:
        folder = made_pair(make_pair)
        target, draft, prompts = (
            str(folder / "target"),
            str(folder / "draft"),
            folder / "prompts.jsonl",
        )
    elif target is None:
        target, draft, prompts = str(DEMO / "target"), str(DEMO / "draft"), DEMO / "prompts.jsonl"
        options = DEMO_ENGINE | options
    elif draft is None or prompts is None:
        raise typer.BadParameter("a TARGET of your own needs --draft and --prompts")
    setup = Setup(target, draft, encode(target, read_prompts(prompts)), tokens, options, resident)
    points = [Point(b, t) for t in temperature for b in batch]
    about = provenance()
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("starting", total=None)
        runs = Interleaved(
            setup,
            compared(target, draft, chain, tree),
            points,
            range(repetitions),
            say=lambda text: progress.update(task, description=text),
        )
        progress.update(task, total=runs.total)
        try:
            with closing(runs.run()) as measured:
                for found in measured:
                    if isinstance(found, Failure):
                        progress.print(f"{found.method} failed:\n{found.log}", markup=False)
                        continue
                    rows.append(found)
                    progress.advance(task)
        except EngineFailed as failure:
            progress.print(str(failure), markup=False)
            raise SystemExit("plain vLLM's engine stopped; its last lines are above") from None
    summaries = report.summarize(rows)
    console.print(report.table(summaries))
    console.print(steps_compared(summaries))
    out.mkdir(parents=True, exist_ok=True)
    report.write_csv(rows, out / "measurements.csv", about)
    report.plot(summaries, out / "speed.png")
    console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
