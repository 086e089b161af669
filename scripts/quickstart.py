#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Generate from real prompts three ways in one run: plain vLLM, its chain, SpecHub trees.

The first two run as vLLM runs them on this machine, with its default runner and kernels.
"""

import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

PAIR = Path(__file__).parent / "demo_pair"
TEMPERATURES = (0.0, 1.0)
console = Console(width=None if os.environ.get("COLUMNS") else 110, highlight=False)


@dataclass
class Result:
    """One way at one temperature."""

    tokens: int
    seconds: float
    steps: int
    drafts: int
    accepted_by_depth: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        """Acceptance length: tokens that one verification emits, the bonus token included."""
        return 1 + sum(self.accepted_by_depth) / self.drafts if self.drafts else 1.0


def counters(llm) -> tuple[int, int, list[int]]:
    """(engine steps, verified drafts, accepted drafts by depth) so far."""
    steps, drafts, accepted = 0, 0, []
    for metric in llm.get_metrics():
        if metric.name == "vllm:iteration_tokens_total":
            steps = metric.count
        elif metric.name == "vllm:spec_decode_num_drafts":
            drafts = metric.value
        elif metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            accepted = metric.values
    return steps, drafts, accepted


def measure(llm, prompts: list[str], temperature: float, max_tokens: int) -> Result:
    from vllm import SamplingParams

    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True, seed=0)
    llm.generate(prompts, params, use_tqdm=False)  # warm
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


def ways(tree: str, num_nodes: int) -> dict[str, dict]:
    """The three engines' names and options."""
    draft = str(PAIR / "draft")
    chain = {
        "method": "draft_model",
        "model": draft,
        "num_speculative_tokens": num_nodes,
        "draft_sample_method": "probabilistic",
    }
    return {
        "no speculation": {},
        f"vLLM chain of {num_nodes}": {"speculative_config": chain},
        f"SpecHub {tree}": {
            "speculative_config": {"method": "spechub", "model": draft, "tree": tree}
        },
    }


def run_engine(
    connection: Connection, log: Path, options: dict, prompts: list[str], max_tokens: int
) -> None:
    """One way in a process of its own: start, say so, then measure whenever asked."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from vllm import LLM
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and options.get("speculative_config", {}).get(
        "draft_sample_method"
    ):
        options = options | {"worker_extension_cls": "fixed_chain.FixedChain"}
    llm = LLM(
        model=str(PAIR / "target"),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=max(8, len(prompts)),
        kv_cache_memory_bytes=256 << 20,
        disable_log_stats=False,
        enable_prefix_caching=False,
        **options,
    )
    connection.send(current_platform.is_cpu())
    for temperature in iter(connection.recv, None):
        connection.send(measure(llm, prompts, temperature, max_tokens))
    llm.llm_engine.engine_core.shutdown()


def receive(connection: Connection, log: Path):
    """A message of an engine's process, or its last words."""
    try:
        return connection.recv()
    except EOFError:
        console.print("".join(log.read_text().splitlines(keepends=True)[-30:]), markup=False)
        raise SystemExit("an engine stopped; its last lines are above") from None


def measure_all(running: dict) -> tuple[dict[tuple[str, float], Result], bool]:
    """Wait until all engines are up, then measure them one at a time. -> (results, on the CPU?)"""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    results: dict[tuple[str, float], Result] = {}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting the engines", total=3 * len(running))
        for _process, connection, log in running.values():
            on_cpu = receive(connection, log)
            progress.advance(task)
        for way, (_process, connection, log) in running.items():
            for temperature in TEMPERATURES:
                progress.update(task, description=f"{way}: generating at T = {temperature:g}")
                connection.send(temperature)
                results[way, temperature] = receive(connection, log)
                progress.advance(task)
    return results, on_cpu


def show(results: dict[tuple[str, float], Result], depth: int, on_cpu: bool) -> None:
    table = Table(title="One run, the same prompts, warm", title_justify="left")
    for column in ("way", "T", "tokens/step", "accepted by depth", "ms/step", "tokens/s"):
        table.add_column(column, justify="left" if column == "way" else "right")
    table.add_column("same text as plain")
    plain_texts = next(iter(results.values())).texts
    for (way, temperature), r in results.items():
        by_depth = [a / r.drafts for a in r.accepted_by_depth if a][: max(depth, 5)]
        same = "-"
        if temperature == 0:
            equal = sum(a == b for a, b in zip(r.texts, plain_texts, strict=True))
            same = "yes" if equal == len(r.texts) else f"{equal} of {len(r.texts)}"
        corrected = "¹" if on_cpu and "chain" in way and temperature > 0 else ""
        table.add_row(
            way + corrected,
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
            "uninitialised memory); its one faulty kernel is corrected for this comparison "
            "(scripts/fixed_chain.py)."
        )
    console.print(
        "On models this small a draft costs nearly as much as the target, so plain decoding wins "
        "in tokens/s. Speculation pays where a step's time is reading a large target's weights, "
        "as on a GPU: there tokens/step is the gain to look at."
    )


def main(
    tree: str = typer.Option("binary:3", help="SpecHub's draft tree."),
    requests: int = typer.Option(6, min=1, help="Concurrent requests."),
    max_tokens: int = typer.Option(96, min=1, help="Tokens to generate per request."),
) -> None:
    start = time.monotonic()
    from vllm_spechub.topology import TokenTree

    shape = TokenTree.parse(tree)
    lines = (PAIR / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["turns"][0] for line in lines]
    prompts = [prompts[i % len(prompts)] for i in range(requests)]
    engines = ways(tree, shape.num_nodes)
    # vLLM is imported once; its own processes are started as vLLM starts them.
    import vllm.entrypoints.llm  # noqa: F401

    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        # They start side by side, which two cores share well, and are measured one at a time.
        running = {}
        for i, (way, options) in enumerate(engines.items()):
            ours, theirs = fork.Pipe()
            log = Path(folder) / f"{i}.log"
            arguments = (theirs, log, options, prompts, max_tokens)
            process = fork.Process(target=run_engine, args=arguments)
            process.start()
            theirs.close()
            running[way] = (process, ours, log)
        results, on_cpu = measure_all(running)
        for _process, connection, _log in running.values():
            connection.send(None)
        show(results, shape.depth, on_cpu)
        for process, _connection, _log in running.values():
            process.join()

    text = results[f"SpecHub {tree}", 1.0].texts[0]
    console.print(Text("SpecHub at T = 1, after this prompt:", style="bold"))
    console.print(Text(prompts[0], style="dim"), Text(text), sep="")
    console.print(f"{time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    typer.run(main)
