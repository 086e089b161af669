#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Measure the demo pair with combined targets at temperature 1: tokens per step and speed of chain
and tree, with and without sharpening, against decoding with the same models plainly.
"""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from vllm_spechub.drafts.sources import Sources
from vllm_spechub.measure.benchmark.interleaved import (
    Failure,
    Interleaved,
    Point,
    Row,
    Setup,
    encode,
)
from vllm_spechub.measure.benchmark.machine import provenance
from vllm_spechub.measure.benchmark.methods import PLAIN, Method, spechub
from vllm_spechub.measure.benchmark.report import write_table
from vllm_spechub.offline.simulation.texts import read_prompts

PAIR = Path(__file__).parent / "demo_pair"
# The demo has no pair of a tuned and an untuned model: the nested draft stands for the latter.
UNTUNED = {"model": str(PAIR / "nested"), "weight": -0.5}
TARGETS: dict[str, dict[str, Any]] = {
    "mixture": {"type": "mixture", "weight": 0.3},
    "contrastive": {"type": "contrastive", "beta": 0.5, "alpha": 0.1},
    "proxy tuning": {"type": "logits", "weight": 0.5, "members": [UNTUNED]},
    "logits": {"type": "logits", "weight": 0.5},
}
HEADER = ["target", "tree", "sharpening", "repetition", "tokens_per_step", "against_plain"]
HEADER += ["ms_per_step", "drafts", "accepted_by_depth"]
console = Console()


def methods(target: dict[str, Any], batch: int) -> dict[tuple[str, int], Method]:
    """By tree and sharpening; the first drafts nothing."""
    draft, own = str(PAIR / "draft"), {"target_distribution": target}
    never = [[1, batch, None], [batch + 1, None, "chain:1"]]
    plain = spechub(PLAIN, draft, tree_by_batch_size=never, **own)
    found = {("none", 1): plain}
    for tree in ("chain:3", "binary:3"):
        for sharpening in (1, 2):
            name = f"{tree} {sharpening}"
            found[tree, sharpening] = spechub(name, draft, tree=tree, sharpening=sharpening, **own)
    return found


def main(
    out: Path = typer.Option(Path("combined.csv"), help="The CSV file to write."),
    batch: int = typer.Option(4, min=1, help="Requests."),
    tokens: int = typer.Option(96, min=4, help="Tokens to time for each request."),
    repetitions: int = typer.Option(5, min=1, help="Repetitions."),
) -> None:
    """Measure combined targets of the demo pair. The engines of a target take turns."""
    about, rows = provenance(), []
    engine = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 128 << 20}
    sources = Sources(str(PAIR / "target"), str(PAIR / "draft"), engine)
    setup = Setup(sources, encode(sources, read_prompts(PAIR / "prompts.jsonl")), tokens)
    for target, spec in TARGETS.items():
        compared = methods(spec, batch)
        of = {method.name: key for key, method in compared.items()}
        interleaved = Interleaved(
            setup, [*compared.values()], [Point(batch, 1.0)], range(repetitions)
        )
        with closing(interleaved.measure()) as results:
            for result in results:
                if isinstance(result, Failure):
                    raise RuntimeError(f"{target}, {result.method}:\n{result.log}")
                rows.append([target, *of[result.method], *_cells(result)])
                write_table(out, about, HEADER, rows)
        console.print(f"{target}: measured", markup=False)
    console.print(out.read_text(), markup=False)


def _cells(row: Row) -> list[Any]:
    numbers = (row.tokens_per_step, row.against_plain, row.ms_per_step)
    accepted = json.dumps(row.accepted_by_depth)
    return [row.repetition, *(f"{number:.3f}" for number in numbers), row.drafts, accepted]


if __name__ == "__main__":
    typer.run(main)
