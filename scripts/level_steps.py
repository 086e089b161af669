#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Time the steps of trees by level widths beside those of static trees of as many nodes and levels.

Each engine runs in this process, on one core, and the processor time of its steps counts, so that
other work on the machine makes little difference. Engines take turns, and in every other round in
the other order. The median of a round's steps is divided by that of the static tree's in the same
round.
"""

import gc
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Annotated

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import typer
from rich.console import Console

from vllm_spechub.measure.benchmark.machine import provenance
from vllm_spechub.measure.benchmark.report import write_table

console = Console()
PAIR = Path(__file__).parent / "demo_pair"
TREES = {
    "15 nodes, 4 levels": ([0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], "levels:3,4,4,3"),
    "31 nodes, 6 levels": (
        [0, 0, 0, 1, 1, 1, 2, 3, 4, 4, *range(5, 22), 22, 23, 25],
        "levels:3,5,6,6,6,4",
    ),
}
"""The demo pair's best static trees at T = 1, and the same numbers of nodes on each level."""


def step_ms(
    draft: str, tree: str | list[int], rule: str, batches: list[int], tokens: int
) -> dict[int, float]:
    """By the number of requests, the median processor time of a step that decodes all of them, in
    milliseconds."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

    config = {"method": "spechub", "model": str(PAIR / draft), "tree": tree, "verification": rule}
    llm = LLM(
        str(PAIR / "target"),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=max(batches),
        kv_cache_memory_bytes=128 << 20,
        enforce_eager=True,
        async_scheduling=False,
        enable_prefix_caching=False,
        speculative_config=config,
    )
    lines = (PAIR / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["turns"][0] for line in lines]
    found = {}
    for batch in batches:
        params = SamplingParams(temperature=1.0, seed=0, max_tokens=tokens, ignore_eos=True)
        for number, prompt in enumerate(prompts[:batch]):
            llm.llm_engine.add_request(f"{batch}-{number}", prompt, params)
        times = []
        while llm.llm_engine.get_num_unfinished_requests() == batch:
            before = time.process_time()
            llm.llm_engine.step()
            times.append(time.process_time() - before)
        found[batch] = 1000 * median(times[2:])  # the first read the prompts
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
    llm.llm_engine.engine_core.shutdown()
    del llm
    destroy_model_parallel()
    destroy_distributed_environment()
    gc.collect()
    return found


def main(
    out: Annotated[Path, typer.Argument(help="The CSV file to write.", dir_okay=False)],
    draft: Annotated[list[str], typer.Option(help="A folder of the demo pair.")] = [  # noqa: B006
        "draft",
        "eagle3",
    ],
    rule: Annotated[str, typer.Option(help="The verification rule.")] = "mixed",
    batch: Annotated[list[int], typer.Option("--batch", "-b", help="Requests.")] = [1, 8],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="Tokens for each request.")] = 96,
    rounds: Annotated[int, typer.Option(help="How often each engine has its turn.")] = 3,
) -> None:
    """Measure the demo pair with its draft model and its head."""
    about, rows = provenance(), []
    for each in draft:
        for size, pair in TREES.items():
            ratios: dict[int, list[float]] = {}
            times: dict[int, list[float]] = {}
            for number in range(rounds):
                order = (0, 1) if number % 2 else (1, 0)
                found = {place: step_ms(each, pair[place], rule, batch, tokens) for place in order}
                static, levels = found[0], found[1]
                for b in batch:
                    times.setdefault(b, []).append(static[b])
                    ratios.setdefault(b, []).append(levels[b] / static[b])
            for b, of_rounds in ratios.items():
                numbers = median(times[b]), median(of_rounds), min(of_rounds), max(of_rounds)
                rows.append([each, size, rule, b, *(f"{number:.3f}" for number in numbers)])
                console.print(*rows[-1])
    header = ["draft", "tree", "rule", "batch", "static_ms", "ratio", "lowest", "highest"]
    write_table(out, about, header, rows)


if __name__ == "__main__":
    typer.run(main)
