#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Generate from real prompts in one run: plain vLLM, its chain, SpecHub trees of a draft model and
of an EAGLE-3 head.

The first two use vLLM's default runner and kernels on this machine.
"""

import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from vllm_spechub.drafts.sources import Sources
from vllm_spechub.measure.benchmark.decoding import acceptance_length, counters
from vllm_spechub.measure.benchmark.engine import EngineFailed, EngineProcess, close_all
from vllm_spechub.measure.benchmark.methods import chain_config

PAIR = Path(__file__).parent / "demo_pair"
TEMPERATURES = (0.0, 1.0)
console = Console(width=None if os.environ.get("COLUMNS") else 110, highlight=False)


@dataclass
class Result:
    """One method at one temperature."""

    tokens: int
    seconds: float
    steps: int
    drafts: int
    accepted_by_depth: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        return acceptance_length(self.drafts, self.accepted_by_depth)


def measure(llm, prompts: list[str], temperature: float, max_tokens: int) -> Result:
    """Generate once from warm, and count. Runs in the engine's process."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True, seed=0)
    # Warm up with the same steps, since the first steps of each new batch size take longer.
    for _ in range(2):
        llm.generate(prompts, params, use_tqdm=False)
    before = counters(llm)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    after = counters(llm)
    accepted = [a - b for a, b in zip(after[2], before[2] or [0] * len(after[2]), strict=True)]
    return Result(
        tokens=sum(len(output.outputs[0].token_ids) for output in outputs),
        seconds=seconds,
        steps=after[0] - before[0],
        drafts=after[1] - before[1],
        accepted_by_depth=accepted,
        texts=[output.outputs[0].text for output in outputs],
    )


def methods(tree: str, num_nodes: int) -> dict[str, dict | None]:
    """The engines' names and speculative configurations."""
    draft, head = str(PAIR / "draft"), str(PAIR / "eagle3")
    return {
        "no speculation": None,
        f"vLLM chain of {num_nodes}": chain_config(Sources(str(PAIR / "target"), draft), num_nodes),
        f"SpecHub {tree}": {"method": "spechub", "model": draft, "tree": tree},
        f"SpecHub {tree}, EAGLE-3": {"method": "spechub", "model": head, "tree": tree},
    }


def measure_all(running: dict[str, EngineProcess], prompts: list[str], max_tokens: int) -> dict:
    """Wait until all engines are up, then measure one at a time. Returns results by method and
    temperature."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    results: dict[tuple[str, float], Result] = {}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting the engines", total=3 * len(running))
        for engine in running.values():
            engine.wait()
            progress.advance(task)
        for method, engine in running.items():
            for temperature in TEMPERATURES:
                progress.update(task, description=f"{method}: generating at T = {temperature:g}")
                results[method, temperature] = engine.call(
                    measure, prompts, temperature, max_tokens
                )
                progress.advance(task)
    return results


def show(results: dict[tuple[str, float], Result], depth: int, on_cpu: bool) -> None:
    """Print a table of all results, and how to read them."""
    table = Table(title="One run with the same prompts, after warming up", title_justify="left")
    for column in ("method", "T", "tokens/step", "accepted by depth", "ms/step", "tokens/s"):
        table.add_column(column, justify="left" if column == "method" else "right")
    table.add_column("same text as plain")
    plain_texts = next(iter(results.values())).texts
    for (method, temperature), r in results.items():
        by_depth = [a / r.drafts for a in r.accepted_by_depth if a][: max(depth, 5)]
        same = "-"
        if temperature == 0:
            equal = sum(a == b for a, b in zip(r.texts, plain_texts, strict=True))
            same = "yes" if equal == len(r.texts) else f"{equal} of {len(r.texts)}"
        corrected = "¹" if on_cpu and "chain" in method and temperature > 0 else ""
        table.add_row(
            method + corrected,
            f"{temperature:g}",
            f"{r.tokens_per_step:.2f}",
            " ".join(f"{share:.0%}" for share in by_depth) or "-",
            f"{1000 * r.seconds / r.steps:.1f}",
            f"{r.tokens / r.seconds:.0f}",
            same,
        )
    console.print(table)
    if on_cpu:
        console.print(
            "¹ vLLM 0.32's chain is broken on the CPU above temperature 0 (it divides by "
            "uninitialised memory). For this comparison its one faulty kernel is corrected "
            "(vllm_spechub/measure/benchmark/fixed_chain.py)."
        )
    console.print(
        "With models this small, a draft pass costs nearly as much as a target pass, so plain vLLM "
        "has the most tokens/s. Speculation pays off if reading the weights of a large target "
        "dominates the step time, as on a GPU. There, tokens/step shows the gain."
    )


def main(
    tree: str = typer.Option("binary:3", help="SpecHub's draft tree."),
    requests: int = typer.Option(6, min=1, help="Concurrent requests."),
    max_tokens: int = typer.Option(96, min=1, help="Tokens to generate for each request."),
) -> None:
    """Generate from the demo pair with plain vLLM, its chain and SpecHub trees, and compare."""
    start = time.monotonic()
    from vllm_spechub.trees.tree import TokenTree

    shape = TokenTree.parse(tree)
    lines = (PAIR / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["turns"][0] for line in lines]
    prompts = [prompts[i % len(prompts)] for i in range(requests)]
    options = {
        "model": str(PAIR / "target"),
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": max(8, requests),
        "kv_cache_memory_bytes": 256 << 20,
        "disable_log_stats": False,
        "enable_prefix_caching": False,
    }
    running: dict[str, EngineProcess] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            # The engines start at the same time and are measured one at a time.
            for method, speculative in methods(tree, shape.num_nodes).items():
                log = Path(folder) / f"{len(running)}.log"
                running[method] = EngineProcess(options | {"speculative_config": speculative}, log)
            results = measure_all(running, prompts, max_tokens)
        except EngineFailed as failure:
            console.print(str(failure), markup=False)
            raise SystemExit("an engine stopped; its last lines are above") from None
        finally:
            close_all(running.values())
    from vllm.platforms import current_platform

    show(results, shape.depth, current_platform.is_cpu())

    text = results[f"SpecHub {tree}", 1.0].texts[0]
    console.print(Text("SpecHub at T = 1, after this prompt:", style="bold"))
    console.print(Text(prompts[0], style="dim"), Text(text), sep="")
    console.print(f"{time.monotonic() - start:.0f} s in total")


if __name__ == "__main__":
    typer.run(main)
