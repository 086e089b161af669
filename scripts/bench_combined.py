#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Measure the demo pair with combined targets at temperature 1: tokens per step and speed of chain
and tree, with and without sharpening, against decoding with the same models plainly. The engines of
a target take turns, so compare figures within one run, as ratios.
"""

import json
import os
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vLLM is imported

import typer
from rich.console import Console

from vllm_spechub.measure.benchmark.decoding import decode
from vllm_spechub.measure.benchmark.machine import provenance
from vllm_spechub.measure.benchmark.report import write_table

PAIR = Path(__file__).parent / "demo_pair"
# The demo has no pair of a tuned and an untuned model: the nested draft stands for the latter.
UNTUNED = {"model": str(PAIR / "nested"), "weight": -0.5}
TARGETS: dict[str, dict[str, Any]] = {
    "mixture": {"type": "mixture", "weight": 0.3},
    "logits": {"type": "logits", "weight": 0.5},
    "contrastive": {"type": "contrastive", "beta": 0.5, "alpha": 0.1},
    "proxy tuning": {"type": "logits", "weight": 0.5, "members": [UNTUNED]},
}
PLAIN = ("none", 1)
HEADER = ["target", "tree", "sharpening", "repetition", "tokens_per_step", "against_plain"]
HEADER += ["ms_per_step", "drafts", "accepted_by_depth"]
console = Console()


def start(target: dict[str, Any], tree: str, sharpening: int, batch: int) -> Any:
    """An engine in this process. Without a tree, it combines and drafts nothing."""
    from vllm import LLM

    shape: dict[str, Any] = {"tree": tree}
    if tree == "none":
        shape = {"tree_by_batch_size": [[1, batch, None], [batch + 1, None, "chain:1"]]}
    config = {"method": "spechub", "model": str(PAIR / "draft"), "target_distribution": target}
    return LLM(
        str(PAIR / "target"),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=batch,
        kv_cache_memory_bytes=64 << 20,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        speculative_config={**config, **shape, "sharpening": sharpening},
        worker_extension_cls="vllm_spechub.measure.benchmark.worker.Observed",
    )


def main(
    out: Path = typer.Option(Path("combined.csv"), help="The CSV file to write."),
    batch: int = typer.Option(4, min=1, help="Requests."),
    tokens: int = typer.Option(96, min=4, help="Tokens to time for each request."),
    repetitions: int = typer.Option(9, min=1, help="Repetitions, each with other prompts."),
) -> None:
    """Measure combined targets of the demo pair."""
    about, rows = provenance(), []
    lines = (PAIR / "prompts.jsonl").read_text().splitlines()
    for name, target in TARGETS.items():
        drafting = [(tree, k) for tree in ("chain:3", "binary:3") for k in (1, 2)]
        engines = {own: start(target, *own, batch) for own in (PLAIN, *drafting)}
        tokenizer = engines[PLAIN].get_tokenizer()
        prompts = [tokenizer(json.loads(line)["turns"][0])["input_ids"] for line in lines]
        for repetition in range(repetitions):
            first = repetition * batch % len(prompts)
            order, plain = [*prompts[first:], *prompts[:first]], 0.0
            for own, llm in engines.items():
                run = decode(llm, order, batch, 1.0, tokens)
                plain = plain or run.tokens_per_s  # the first of the engines
                numbers = (run.tokens_per_step, run.tokens_per_s / plain, run.ms_per_step)
                counts = (run.drafts, json.dumps(run.accepted_by_depth))
                rows.append([name, *own, repetition, *(f"{n:.3f}" for n in numbers), *counts])
            write_table(out, about, HEADER, rows)
        for llm in engines.values():
            llm.llm_engine.engine_core.shutdown()
        console.print(f"{name}: measured", markup=False)
    console.print(out.read_text(), markup=False)


if __name__ == "__main__":
    typer.run(main)
