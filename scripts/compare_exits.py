#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compare exits of a nested draft that are the same for all tokens with an exit for each token.

S2D (arXiv 2407.01955) leaves the draft at the first exit whose most probable token has more than a
threshold's probability. Here both are read on held-out texts, token by token, and the exit by
confidence is compared with the fixed exits' line at the same mean number of layers. Layers that a
token skips cost nothing here, though a tree's level runs as deep as its least confident node.
"""

from pathlib import Path

import numpy as np
import torch
import typer
from rich.console import Console
from train_demo_pair import encode, evenly_spaced, read_corpus
from train_nested_draft import CONTEXT, PAIR, ROWS, exit_logits, load
from transformers import AutoTokenizer

from vllm_spechub.measure.benchmark.machine import provenance
from vllm_spechub.measure.benchmark.report import write_table

console = Console()


@torch.no_grad()
def main(
    target: Path = typer.Option(PAIR / "target", help="The target."),
    draft: Path = typer.Option(PAIR / "nested", help="The nested draft."),
    exits: list[int] = typer.Option([3, 6, 9, 12], "--exit", help="Layers of an exit; repeatable."),
    thresholds: list[float] = typer.Option([0.3, 0.5, 0.7, 0.9], help="Of the best probability."),
    texts: int = typer.Option(60, min=1, help="Held-out texts."),
    out: Path = typer.Option(Path("by_confidence.csv"), help="The CSV file to write."),
) -> None:
    """Compare fixed exits with exits by confidence: overlap at T = 1, and agreement at T = 0."""
    about = provenance()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(target)
    verifier, drafter = load(target).eval(), load(draft).eval()
    _, held_out = read_corpus()
    # by exit, each [num_tokens]
    overlaps, agrees, best = (torch.empty(len(exits), 0) for _ in range(3))
    for tokens in evenly_spaced(encode(tokenizer, held_out), CONTEXT, texts).split(ROWS):
        p = verifier(input_ids=tokens).logits.softmax(-1)
        q = torch.stack(exit_logits(drafter, tokens, exits)).softmax(-1)
        new = (
            torch.minimum(p, q).sum(-1),
            (p.argmax(-1) == q.argmax(-1)).float(),
            q.amax(-1),
        )
        overlaps, agrees, best = (
            torch.cat([old, part.flatten(1)], dim=1)
            for old, part in zip((overlaps, agrees, best), new, strict=True)
        )
    layers = torch.tensor(exits, dtype=torch.float)
    rows = []

    def add(name: str, taken: torch.Tensor) -> None:
        """`taken`: [num_tokens], the place of each token's exit."""
        mean = layers[taken].mean().item()
        found = [
            values.gather(0, taken.unsqueeze(0)).mean().item() for values in (overlaps, agrees)
        ]
        fixed = [np.interp(mean, exits, values.mean(1).numpy()) for values in (overlaps, agrees)]
        above = [value - line for value, line in zip(found, fixed, strict=True)]
        rows.append([name, *(f"{value:.4f}" for value in (mean, *found, *above))])

    for place, layer in enumerate(exits):
        add(f"{layer} layers", torch.full_like(best[0], place, dtype=torch.int64))
    for threshold in thresholds:
        sure = best > threshold
        sure[-1] = True
        add(f"max > {threshold:g}", sure.int().argmax(0))
    header = [
        "exit",
        "layers",
        "overlap",
        "agreement",
        "overlap_above_line",
        "agreement_above_line",
    ]
    write_table(out, about, header, rows)
    console.print(out.read_text(), markup=False)


if __name__ == "__main__":
    typer.run(main)
