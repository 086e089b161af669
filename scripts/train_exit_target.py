#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Train a second demo target, whose first layers are a draft worth having (`early_exit`).

It is deeper and thinner than the demo target and has its tokenizer. As in LayerSkip (Elhoushi et
al., ACL 2024, arXiv 2404.16710) an early-exit loss is added to that of the whole depth: each step
also trains one of the exits, by turns, through the model's own norm and output matrix. Both losses
are cross entropies against the demo target's distribution over the demo pair's training texts, from
which so small a model learns faster than from the texts themselves, and so that the demo drafts fit
this target, too. LayerSkip also drops layers at random; eight layers do without.

The result is determined by ``--seed``, the versions of Python and PyTorch, and the thread count.
"""

import json
import platform
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import torch
import typer
from rich.console import Console
from train_demo_pair import (
    CONTEXT,
    HEAD_SIZE,
    encode,
    evaluate,
    evenly_spaced,
    fit,
    progress_bars,
    read_corpus,
    save,
    windows,
)
from train_nested_draft import PAIR, ExitWeights, exits_loss, load, overlaps
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vllm_spechub.measure.preflight import check_output_folder
from vllm_spechub.measure.terminal import one_line_errors

ROWS = 4  # rows per step
EARLY_WEIGHT = 0.4  # of the exit's loss, relative to the sum of both
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
console = Console()


def rotating_weights(exits: Sequence[int], whole: int) -> ExitWeights:
    """The whole depth and one of the exits, by turns."""
    turns = cycle(exits)
    return lambda: {next(turns): EARLY_WEIGHT, whole: 1 - EARLY_WEIGHT}


def main(
    out: Path = typer.Option(PAIR / "exit_target", help="The folder to write."),
    exits: list[int] = typer.Option([2, 4], "--exit", help="Layers of an exit; repeatable."),
    steps: int = typer.Option(1500, min=1, help="Training steps."),
    lr: float = typer.Option(4e-3, min=0, help="The highest learning rate."),
    seed: int = typer.Option(0, help="The same seed gives the same target."),
) -> None:
    """Train a target with early exits on the Python standard library."""
    layers = MODEL["num_hidden_layers"]
    with one_line_errors(console):
        check_output_folder("--out", out)
        exits = sorted(set(exits))
        if not exits or exits[0] < 1 or exits[-1] >= layers:
            raise ValueError(f"--exit must be from 1 to {layers - 1}, got {exits}")
    start = time.process_time()
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # these operations are too small to share
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    teacher = load(PAIR / "target").eval().requires_grad_(False)
    train, held_out = (encode(tokenizer, texts) for texts in read_corpus())
    eos = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        head_dim=HEAD_SIZE,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=eos,
        eos_token_id=eos,
        **MODEL,
    )
    target = LlamaForCausalLM(config)
    batches = windows(train, ROWS, CONTEXT, torch.Generator().manual_seed(seed))
    loss = exits_loss(target, teacher, rotating_weights(exits, layers))
    with progress_bars() as progress:
        fit("target", target, loss, batches, steps, lr, progress)
    target = target.bfloat16().float().eval()  # what will be stored
    texts = evenly_spaced(held_out, CONTEXT, 100)
    draft = load(PAIR / "draft").eval()
    held_out_loss = evaluate(target, draft, held_out, 100)
    card = {
        "target_loss": held_out_loss["target_loss"],
        "overlap_by_exit": overlaps(target, target, texts, exits),
        "overlap_of_the_demo_draft": held_out_loss["overlap"],
        "parameters": target.num_parameters(),
        "steps": steps,
        "tokens_per_step": ROWS * CONTEXT,
        "seed": seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_minutes": round((time.process_time() - start) / 60, 1),
        "command": f"python scripts/train_exit_target.py --seed {seed}",
    }
    save(target.bfloat16(), tokenizer, out)
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    console.print_json(data=card)


if __name__ == "__main__":
    typer.run(main)
