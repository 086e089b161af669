#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Measure both demo targets with the nested draft at several depths, with the plain draft, and with
early exits: tokens per step. `scripts/bench_e2e.py` measures their speed.
"""

import gc
import json
import os
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vLLM is imported

import typer
from rich.console import Console

from vllm_spechub.measure.benchmark.decoding import Decoded, decode
from vllm_spechub.measure.benchmark.machine import provenance
from vllm_spechub.measure.benchmark.report import write_table

PAIR = Path(__file__).parent / "demo_pair"
NESTED = {f"nested draft, {k} layers": {"model": "nested", "draft_layers": k} for k in (3, 6, 12)}
DRAFTS = NESTED | {"plain draft, 12 layers": {"model": "draft"}}
EXITS = {f"early exit, {k} layers": {"proposer": "early_exit", "exit_layer": k} for k in (2, 4)}
METHODS: dict[str, dict[str, dict[str, Any]]] = {"target": DRAFTS, "exit_target": EXITS | DRAFTS}
console = Console()


def measure(
    target: str, options: dict[str, Any], tree: str, batch: int, tokens: int, times: int
) -> dict[float, list[Decoded]]:
    """By temperature, the repetitions with one engine."""
    from vllm import LLM
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

    config = {"method": "spechub", "tree": tree} | options
    if "model" in options:
        config["model"] = str(PAIR / options["model"])
    llm = LLM(
        str(PAIR / target),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=batch,
        kv_cache_memory_bytes=128 << 20,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        speculative_config=config,
        worker_extension_cls="vllm_spechub.measure.benchmark.worker.Observed",
    )
    tokenizer = llm.get_tokenizer()
    lines = (PAIR / "prompts.jsonl").read_text().splitlines()
    prompts = [tokenizer(json.loads(line)["turns"][0])["input_ids"] for line in lines]
    found = {}
    for temperature in (0.0, 1.0):
        runs = [prompts[i::times] for i in range(times)]
        found[temperature] = [decode(llm, run, batch, temperature, tokens) for run in runs]
    llm.llm_engine.engine_core.shutdown()
    del llm
    destroy_model_parallel()
    destroy_distributed_environment()
    gc.collect()
    return found


def main(
    out: Path = typer.Option(Path("exits.csv"), help="The CSV file to write."),
    tree: str = typer.Option("binary:3", help="The tree."),
    batch: int = typer.Option(4, min=1, help="Requests."),
    tokens: int = typer.Option(40, min=4, help="Tokens to count for each request."),
    repetitions: int = typer.Option(3, min=1, help="Repetitions, each with other prompts."),
) -> None:
    """Measure both demo targets with drafts of several depths."""
    about, rows = provenance(), []
    for target, methods in METHODS.items():
        arguments = tree, batch, tokens, repetitions
        for name, options in methods.items():
            for temperature, runs in measure(target, options, *arguments).items():
                accepted = sum(sum(run.accepted_by_depth) for run in runs)
                emitted = 1 + accepted / sum(run.drafts for run in runs)
                rows.append([target, name, f"{temperature:g}", f"{emitted:.3f}"])
    header = ["target", "draft", "temperature", "tokens_per_step"]
    write_table(out, about, header, rows)
    console.print(out.read_text(), markup=False)


if __name__ == "__main__":
    typer.run(main)
