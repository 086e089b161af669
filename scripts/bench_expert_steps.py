#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Measure a step of a mixture of experts by its number of rows, beside a dense model's.

Both models are made with random weights, and a row computes as much in one as in the other: the
dense model's layers are as wide as all experts that a row chooses together. Plain vLLM decodes a
number of requests, of which each is a row of the step. What a tree's rows cost is the same, except
for attention.
"""

import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
import typer
from rich.console import Console
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from vllm_spechub.measure.benchmark.decoding import decode
from vllm_spechub.measure.benchmark.machine import provenance
from vllm_spechub.measure.benchmark.report import write_table
from vllm_spechub.measure.preflight import check_output_file
from vllm_spechub.measure.terminal import one_line_errors
from vllm_spechub.trees.expert_cost import experts_read

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
}
EXPERT_SIZE = 256
OBSERVED = "vllm_spechub.measure.benchmark.worker.Observed"
console = Console()


def make(experts: int, chosen: int, folder: Path) -> None:
    """Write a model with random weights; a dense one if `experts` is 0."""
    torch.manual_seed(0)
    if experts:
        config = Qwen3MoeConfig(
            **SIZES,
            num_experts=experts,
            num_experts_per_tok=chosen,
            moe_intermediate_size=EXPERT_SIZE,
        )
        model = Qwen3MoeForCausalLM(config)
    else:
        config = Qwen3Config(**SIZES, intermediate_size=chosen * EXPERT_SIZE)
        model = Qwen3ForCausalLM(config)
    model.bfloat16().save_pretrained(folder)


def step_times(folder: Path, rows: list[int], tokens: int, repetitions: int) -> dict[int, float]:
    """Milliseconds of a step by its number of rows: medians over the repetitions."""
    from vllm import LLM

    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=max(rows),
        kv_cache_memory_bytes=1 << 28,
        worker_extension_cls=OBSERVED,
        enable_prefix_caching=False,
        disable_log_stats=False,
    )
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2048, (max(rows), 4), generator=generator).tolist()
    found: dict[int, list[float]] = {count: [] for count in rows}
    for _ in range(repetitions):
        for count, times in found.items():
            times.append(decode(llm, prompts, count, 1.0, tokens).ms_per_step)
    llm.llm_engine.engine_core.shutdown()
    return {count: median(times) for count, times in found.items()}


def main(
    experts: int = typer.Option(32, min=2, help="Experts of a layer."),
    chosen: int = typer.Option(4, min=1, help="Experts that a row chooses."),
    rows: list[int] = typer.Option([1, 2, 4, 8, 15, 30, 60], help="Rows of a step; repeatable."),
    tokens: int = typer.Option(24, min=4, help="Steps to time."),
    repetitions: int = typer.Option(5, min=1, help="Repetitions."),
    out: Path = typer.Option(Path("expert_steps.csv"), help="The CSV file to write."),
) -> None:
    """Measure steps of a made mixture of experts and of a dense model."""
    with one_line_errors(console):
        check_output_file("--out", out)
        if chosen > experts:
            raise ValueError(f"--chosen is {chosen}, allowed: at most --experts {experts}")
    about = provenance()
    models = {"experts": experts, "dense": 0}
    times = {}
    for name, count in models.items():
        with tempfile.TemporaryDirectory() as folder:
            make(count, chosen, Path(folder))
            times[name] = step_times(Path(folder), rows, tokens, repetitions)
    lines = []
    for count in rows:
        read = experts_read(experts, chosen, count)
        lines.append([count, f"{read:.1f}", *(f"{times[name][count]:.3f}" for name in models)])
    write_table(out, about, ["rows", "experts_read", "experts_ms", "dense_ms"], lines)
    console.print(out.read_text(), markup=False)


if __name__ == "__main__":
    sys.exit(typer.run(main))
