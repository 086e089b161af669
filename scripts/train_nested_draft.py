#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Train the demo draft's exits together, so that it can be cut at several depths (`draft_layers`).

Sorted training (Kavehzadeh et al., 2024, arXiv 2407.01955): after some of its layers, the draft's
own norm and output matrix already give a distribution. Here each such exit learns the target's
distribution over the demo pair's training texts, as the whole draft did, from whose weights
training starts. The whole depth counts as much as all earlier exits together.

The result is determined by ``--seed``, the versions of Python and PyTorch, and the thread count.
"""

import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import typer
from rich.console import Console
from train_demo_pair import encode, evenly_spaced, fit, progress_bars, read_corpus, save, windows
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from vllm_spechub.measure.preflight import check_output_folder
from vllm_spechub.measure.terminal import one_line_errors

PAIR = Path(__file__).parent / "demo_pair"
CONTEXT = 256  # tokens per training row
ROWS = 8  # rows per step
EARLY_WEIGHT = 0.5  # of all earlier exits' losses together, relative to the sum of all
console = Console()

ExitWeights = Callable[[], dict[int, float]]
"""For one training step: by the number of layers, the weight of an exit's loss."""


def exit_logits(
    model: LlamaForCausalLM,
    # [num_texts, length] int64
    tokens: torch.Tensor,
    exits: Sequence[int],
) -> list[torch.Tensor]:
    """What a model gives after so many layers, through its own norm and output matrix.

    Returns:
        For each exit, logits [num_texts, length, vocab_size].
    """
    output = model.model(input_ids=tokens, output_hidden_states=True, use_cache=False)
    states = output.hidden_states
    whole = len(states) - 1
    # transformers has normed the last one
    normed = [states[k] if k == whole else model.model.norm(states[k]) for k in exits]
    return [model.lm_head(state) for state in normed]


def exits_loss(model: LlamaForCausalLM, teacher, weights: ExitWeights):
    """The weighted cross entropies of exits against the teacher's law, on [num_texts, length]
    tokens."""

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        chosen = weights()
        with torch.autocast("cpu", torch.bfloat16):
            logits = exit_logits(model, tokens, list(chosen))
            with torch.no_grad():
                law = teacher(input_ids=tokens).logits.float().softmax(-1).flatten(0, 1)
        losses = [
            torch.nn.functional.cross_entropy(row.float().flatten(0, 1), law) for row in logits
        ]
        return sum(w * one for w, one in zip(chosen.values(), losses, strict=True))

    return loss


def sorted_weights(exits: Sequence[int]) -> ExitWeights:
    """All exits at once, the earlier ones alike. The last of `exits` is the whole depth."""
    *early, whole = exits
    weights = {k: EARLY_WEIGHT / len(early) for k in early} | {whole: 1 - EARLY_WEIGHT}
    return lambda: weights


@torch.no_grad()
def overlaps(
    model: LlamaForCausalLM, target, texts: torch.Tensor, exits: Sequence[int]
) -> dict[int, float]:
    """By exit, the mean of sum_i min(p_i, q_i) with the target at T = 1.

    Args:
        texts: [num_texts, length] int64.
    """
    totals = torch.zeros(len(exits))
    for tokens in texts.split(ROWS):
        p = target(input_ids=tokens).logits.softmax(-1)
        for i, logits in enumerate(exit_logits(model, tokens, exits)):
            totals[i] += torch.minimum(p, logits.softmax(-1)).sum(-1).mean(-1).sum()
    return dict(zip(exits, (round(t, 4) for t in (totals / len(texts)).tolist()), strict=True))


def load(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def main(
    out: Path = typer.Option(PAIR / "nested", help="The folder to write."),
    exits: list[int] = typer.Option([3, 6, 9, 12], "--exit", help="Layers of an exit; repeatable."),
    steps: int = typer.Option(1800, min=1, help="Training steps."),
    lr: float = typer.Option(2e-3, min=0, help="The highest learning rate."),
    seed: int = typer.Option(0, help="The same seed gives the same draft."),
) -> None:
    """Train a nested draft for the demo target on the Python standard library."""
    with one_line_errors(console):
        check_output_folder("--out", out)
        layers = json.loads((PAIR / "draft" / "config.json").read_text())["num_hidden_layers"]
        exits = sorted(set(exits) | {layers})
        if len(exits) < 2 or exits[0] < 1 or exits[-1] > layers:
            raise ValueError(f"--exit must be from 1 to {layers - 1}, got {exits}")
    start = time.process_time()
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # these operations are too small to share
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    target = load(PAIR / "target").eval().requires_grad_(False)
    draft = load(PAIR / "draft")
    train, held_out = (encode(tokenizer, texts) for texts in read_corpus())
    texts = evenly_spaced(held_out, CONTEXT, 200)
    before = overlaps(draft, target, texts, exits)
    console.print(f"overlap by exit, before: {before}")

    batches = windows(train, ROWS, CONTEXT, torch.Generator().manual_seed(seed))
    loss = exits_loss(draft, target, sorted_weights(exits))
    with progress_bars() as progress:
        fit("draft", draft, loss, batches, steps, lr, progress)
    draft = draft.bfloat16().float().eval()  # what will be stored
    card = {
        "overlap_by_exit": overlaps(draft, target, texts, exits),
        "overlap_by_exit_before": before,
        "parameters": draft.num_parameters(),
        "steps": steps,
        "tokens_per_step": ROWS * CONTEXT,
        "seed": seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_minutes": round((time.process_time() - start) / 60, 1),
        "command": f"python scripts/train_nested_draft.py --seed {seed}",
    }
    save(draft.bfloat16(), tokenizer, out)
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    console.print_json(data=card)


if __name__ == "__main__":
    typer.run(main)
