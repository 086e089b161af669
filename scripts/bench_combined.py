#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Measure the demo pair with combined targets at temperature 1: tokens per step of chain and tree,
with and without sharpening. `scripts/bench_e2e.py --config` measures their speed.
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
TARGETS = (
    {"type": "mixture", "weight": 0.3},
    {"type": "logits", "weight": 0.5},
    {"type": "contrastive", "beta": 0.5, "alpha": 0.1},
)
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
    out: Path = typer.Option(Path("combined.csv"), help="The CSV file to write."),
    batch: int = typer.Option(4, min=1, help="Requests."),
    tokens: int = typer.Option(96, min=4, help="Tokens to count for each request."),
    repetitions: int = typer.Option(3, min=1, help="Repetitions, each with other prompts."),
) -> None:
    """Measure combined targets of the demo pair."""
    about, rows = provenance(), []
    for target in TARGETS:
        for tree in ("chain:3", "binary:3"):
            for sharpening in (1, 2):
                options = {"model": "draft", "target_distribution": target}
                options["sharpening"] = sharpening
                runs = measure("target", options, tree, batch, tokens, repetitions)[1.0]
                each = [1 + sum(run.accepted_by_depth) / run.drafts for run in runs]
                accepted = sum(sum(run.accepted_by_depth) for run in runs)
                emitted = 1 + accepted / sum(run.drafts for run in runs)
                spread = f"{min(each):.3f}", f"{max(each):.3f}"
                rows.append([target["type"], tree, sharpening, f"{emitted:.3f}", *spread])
    header = ["target", "tree", "sharpening", "tokens_per_step", "lowest", "highest"]
    write_table(out, about, header, rows)
    console.print(out.read_text(), markup=False)


if __name__ == "__main__":
    typer.run(main)
