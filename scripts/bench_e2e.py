#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compare plain vLLM, its draft-model chain and SpecHub end to end, on your own models.

    python scripts/bench_e2e.py TARGET --draft DRAFT --prompts FILE
    python scripts/bench_e2e.py --make-pair 8b:1b:0.7   # without weights: makes a pair first
    python scripts/bench_e2e.py                         # the demo pair

All requests of a batch are decoding from the first timed step to the last. The engines take turns,
so compare figures within one run, as ratios. The script writes measurements.csv and speed.png into
a folder.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vllm_spechub.drafts.sources import Sources
from vllm_spechub.measure import preflight
from vllm_spechub.measure.benchmark import methods, report
from vllm_spechub.measure.benchmark.interleaved import (
    Failure,
    Interleaved,
    Point,
    Row,
    Setup,
    default_resident,
    encode,
    engine_options,
)
from vllm_spechub.measure.benchmark.machine import provenance
from vllm_spechub.measure.terminal import one_line_errors, progress_bar

SCRIPTS = Path(__file__).parent
DEMO_PAIR, MAKE_PAIR = SCRIPTS / "demo_pair", SCRIPTS / "make_pair.py"
DEFAULT_NODES = 14
"""The number of tokens that SpecHub drafts by default. A chain of this length is measured, too."""
DEMO_ENGINE = {"dtype": "float32"}
SPECHUB = "SpecHub"
console = Console(width=None if os.environ.get("COLUMNS") else 120, highlight=False)


def made_pair(spec: str) -> Path:
    """The folder of a pair of random models, which is made unless it exists."""
    parts = spec.split(":")
    if len(parts) != 3:
        raise ValueError(f"--make-pair must be TARGET:DRAFT:OVERLAP, got {spec!r}")
    folder = Path.home() / ".cache" / "vllm-spechub" / "-".join(["pair", *parts])
    if not (folder / "card.json").exists():
        target, draft, overlap = parts
        options = ["--target", target, "--draft", draft, "--overlap", overlap]
        # A separate process, so that nothing stays on the GPU when engines are forked.
        made = subprocess.run([sys.executable, MAKE_PAIR, folder, *options])
        if made.returncode:
            raise SystemExit(made.returncode)
    return folder


def pair_files(pair: Path) -> tuple[str, str, Path]:
    """The target, draft and prompts in a folder of `scripts/make_pair.py`."""
    return str(pair / "target"), str(pair / "draft"), pair / "prompts.jsonl"


def compared(
    sources: Sources,
    chains: Sequence[int],
    trees: Sequence[str],
    configs: dict[str, dict[str, Any]],
) -> list[methods.Method]:
    """All methods to measure. `auto` is one of them if a schedule was measured for this pair."""
    from vllm_spechub.trees.measured_schedule import measured_schedule
    from vllm_spechub.triton_kernels.rules import DEFAULT_RULE

    draft = sources.draft
    found = [methods.plain(), *(methods.chain(sources, length) for length in chains)]
    found += [methods.spechub(SPECHUB, draft)]
    for tree in trees:
        shape = json.loads(tree) if tree.startswith("[") else tree
        found.append(methods.spechub(f"SpecHub {tree}", draft, tree=shape))
    found += [methods.Method(name, config) for name, config in configs.items()]
    try:
        measured_schedule(sources.target, draft, methods.proposer_of(sources), DEFAULT_RULE)
        found.append(methods.spechub("SpecHub auto", draft, tree_by_batch_size="auto"))
    except ValueError as error:
        console.print(f"without SpecHub auto: {error}", markup=False)
    return found


def startable(setup: Setup, compared: list[methods.Method], batch: int) -> list[methods.Method]:
    """The methods that vLLM and this package would start. The others are named with the reason.

    Raises:
        ValueError: plain vLLM or SpecHub is refused.
    """
    resident = setup.resident or default_resident(len(compared))
    options = engine_options(setup, batch, resident)
    refused = preflight.engine_refusals(options, {m.name: m.speculative for m in compared})
    for name in (methods.PLAIN, SPECHUB):
        if name in refused:
            raise ValueError(refused[name])
    for name, reason in refused.items():
        console.print(f"without {name}: {reason}", markup=False)
    return [method for method in compared if method.name not in refused]


def measure(
    setup: Setup, compared: list[methods.Method], points: list[Point], repetitions: int, csv: Path
) -> list[Row]:
    """Measure all methods. What was measured is written even if the run is interrupted."""
    about = provenance()
    rows: list[Row] = []
    try:
        with progress_bar(console) as progress:
            task = progress.add_task("starting", total=None)
            interleaved = Interleaved(
                setup,
                compared,
                points,
                range(repetitions),
                report=lambda text: progress.update(task, description=text),
            )
            progress.update(task, total=interleaved.total)
            with closing(interleaved.measure()) as results:
                for result in results:
                    if isinstance(result, Failure):
                        console.print(f"{result.method} failed:\n{result.log}", markup=False)
                        continue
                    rows.append(result)
                    progress.advance(task)
    finally:
        report.write_csv(rows, csv, about)
    return rows


def step_ratios(summaries: dict[Point, dict[str, report.Summary]]) -> str:
    """The duration of a SpecHub step relative to a chain that drafts as many tokens."""
    ratios = [
        f"{found['SpecHub'].ms_per_step / chain.ms_per_step:.2f} "
        f"(batch {point.batch}, T = {point.temperature:g})"
        for point, found in summaries.items()
        if "SpecHub" in found and (chain := found.get(f"chain {DEFAULT_NODES}"))
    ]
    return (
        f"duration of a SpecHub step relative to a chain of {DEFAULT_NODES}: "
        f"{', '.join(ratios) or 'not measured'}"
    )


def main(
    target: Annotated[
        str | None, typer.Argument(help="The target model: a folder or a Hugging Face name.")
    ] = None,
    draft: Annotated[str | None, typer.Option(help="The draft model or head.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSON lines with `turns` or `prompt`, or text with a prompt per line."),
    ] = None,
    make_pair: Annotated[
        str | None,
        typer.Option(help="TARGET:DRAFT:OVERLAP, with model sizes of scripts/make_pair.py."),
    ] = None,
    batch: Annotated[
        list[int], typer.Option("--batch", "-b", min=1, help="A number of requests; repeatable.")
    ] = [1, 4, 16, 64],
    temperature: Annotated[
        list[float],
        typer.Option("--temperature", "-T", min=0.0, help="A sampling temperature; repeatable."),
    ] = [0.0, 0.6, 1.0],
    chain: Annotated[
        list[int], typer.Option("--chain", "-K", min=1, help="A chain length; repeatable.")
    ] = [*range(1, 9), DEFAULT_NODES],
    tree: Annotated[
        list[str], typer.Option(help="A further tree to compare, as for `tree`; repeatable.")
    ] = [],
    config: Annotated[
        list[str],
        typer.Option(help="A further `speculative_config` to compare: NAME=JSON; repeatable."),
    ] = [],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to time per request.")] = 128,
    repetitions: Annotated[int, typer.Option(min=1, help="Repetitions per measurement.")] = 3,
    resident: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The number of engines that run at the same time.",
            show_default="all on the CPU, else 3",
        ),
    ] = None,
    engine: Annotated[str, typer.Option(help="Further engine options, as JSON.")] = "{}",
    out: Annotated[Path, typer.Option(help="The folder for the CSV file and the plot.")] = Path(
        "bench_e2e"
    ),
) -> None:
    """Compare plain vLLM, its draft-model chain and SpecHub end to end."""
    with one_line_errors(console):
        preflight.check_modules("transformers", "matplotlib.pyplot")
        preflight.check_output_folder("--out", out)
        options = preflight.parse_engine_options("--engine", engine)
        configs = {}
        for named in config:
            name, _, text = named.partition("=")
            configs[name] = preflight.parse_object(f"--config {name}", text)
        if make_pair is not None:
            target, draft, prompts = pair_files(made_pair(make_pair))
        elif target is None:
            target, draft, prompts = pair_files(DEMO_PAIR)
            options = DEMO_ENGINE | options
        elif draft is None or prompts is None:
            raise ValueError("a TARGET of your own needs --draft and --prompts")
        sources = Sources(target, draft, options)
        preflight.check_pair(sources, "--draft", in_engines=True)
        from vllm_spechub.offline.simulation.texts import read_prompts

        setup = Setup(sources, encode(sources, read_prompts(prompts)), tokens, resident)
        points = [Point(b, t) for t in temperature for b in batch]
        what = startable(setup, compared(sources, chain, tree, configs), max(batch))
        rows = measure(setup, what, points, repetitions, out / "measurements.csv")
        summaries = report.summarize(rows)
        console.print(report.table(summaries))
        console.print(step_ratios(summaries))
        report.plot(summaries, out / "speed.png")
        console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
