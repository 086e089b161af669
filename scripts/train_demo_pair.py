#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Train the demo pair: a small Llama target and a smaller Llama draft that write Python.

The corpus is the running interpreter's own standard library, so any machine has it. The target
is trained on the text. The draft is trained on the target's distribution over the same text
(distillation), since speculation needs a draft that overlaps with the target. Both share one
byte-level BPE tokenizer.

The result is determined by ``--seed``, the versions of Python and PyTorch, and the thread count.
"""

import hashlib
import json
import math
import platform
import sysconfig
import time
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_spechub.measure.preflight import check_output_folder
from vllm_spechub.measure.terminal import one_line_errors

EOS = "<|endoftext|>"
# The models were trained without roles, so a chat is its messages joined together.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
EXCLUDED_PARTS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings"}
EXCLUDED_PARTS |= {"turtledemo", "__phello__", "ensurepip", "config-3.11-x86_64-linux-gnu"}
HELD_OUT_ONE_IN = 20
CONTEXT = 512  # tokens per training row
ROWS = 8  # rows per step
MODELS = {
    "target": {
        "hidden_size": 192,
        "intermediate_size": 640,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    # Thin and deep: on a CPU the time of a draft pass depends on the number of layers, hardly on
    # their width.
    "draft": {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 12,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
HEAD_SIZE = 32
# Few for a quick look; more for a study, since prompts differ more than the texts of one prompt.
PROMPTS = {"prompts.jsonl": 12, "study_prompts.jsonl": 39}
console = Console()


def read_corpus() -> tuple[list[str], list[str]]:
    """The standard library's sources as (training files, held-out files), in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    train, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_PARTS & set(relative.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        digest = int(hashlib.sha256(str(relative).encode()).hexdigest(), 16)
        (held_out if digest % HELD_OUT_ONE_IN == 0 else train).append(text)
    return train, held_out


def held_out_prompts(texts: list[str], count: int) -> list[dict]:
    """The first lines of at most `count` held-out functions and classes, in Spec-Bench's prompt
    format."""
    openings = []
    for text in texts:
        lines = text.split("\n")
        starts = [i for i, line in enumerate(lines) if line.startswith(("def ", "class "))]
        for start in starts[2::7]:
            opening = "\n".join(lines[max(0, start - 2) : start + 4]).strip("\n")
            if 80 < len(opening) < 320:
                openings.append(opening)
    chosen = openings[:: max(1, len(openings) // count)][:count]
    return [
        {"question_id": i, "category": "python", "turns": [prompt]}
        for i, prompt in enumerate(chosen, start=1)
    ]


def write_prompts(texts: list[str], out: Path) -> None:
    """Write each file of `PROMPTS`, one prompt a line."""
    for name, count in PROMPTS.items():
        lines = [json.dumps(prompt) for prompt in held_out_prompts(texts, count)]
        (out / name).write_text("\n".join(lines) + "\n")


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, bos_token=EOS, chat_template=CHAT_TEMPLATE
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All files in one stream, an end-of-text token before each. Returns [num_tokens] int64."""
    stream: list[int] = []
    for text in texts:
        stream.append(tokenizer.eos_token_id)
        stream.extend(tokenizer(text)["input_ids"])
    return torch.tensor(stream)


def build(name: str, vocab_size: int, eos: int) -> LlamaForCausalLM:
    """Make a model of `MODELS` with random weights."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        head_dim=HEAD_SIZE,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=eos,
        eos_token_id=eos,
        **MODELS[name],
    )
    return LlamaForCausalLM(config)


def rows(stream: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A batch of random windows. Returns [ROWS, CONTEXT + 1]."""
    starts = torch.randint(0, len(stream) - CONTEXT - 1, (ROWS,), generator=generator)
    return torch.stack([stream[s : s + CONTEXT + 1] for s in starts.tolist()])


def fit(name, model, teacher, stream, steps, peak_lr, generator, progress) -> None:
    """Train `model` on the text (no teacher) or on the teacher's distribution over it."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak_lr,
        betas=(0.9, 0.95),
    )
    warmup = max(1, steps // 25)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * i / steps))),
    )
    task = progress.add_task(name, total=steps, loss=float("nan"))
    smoothed = None
    for _ in range(steps):
        batch = rows(stream, generator)
        inputs, labels = batch[:, :-1], batch[:, 1:]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=inputs).logits.float()
            if teacher is None:
                wanted = labels.reshape(-1)
            else:
                with torch.no_grad():
                    wanted = teacher(input_ids=inputs).logits.float().softmax(-1).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        smoothed = loss.item() if smoothed is None else 0.98 * smoothed + 0.02 * loss.item()
        progress.update(task, advance=1, loss=smoothed)


@torch.no_grad()
def evaluate(target, draft, stream: torch.Tensor, max_windows: int = 200) -> dict[str, float]:
    """Held-out losses (nats per token) and overlap: the mean of sum_i min(p_i, q_i) at T = 1."""
    windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    windows = windows[:: max(1, len(windows) // max_windows)]
    totals = {"target_loss": 0.0, "draft_loss": 0.0, "overlap": 0.0}
    for window in windows.split(ROWS):
        p = target(input_ids=window).logits.float()
        q = draft(input_ids=window).logits.float()
        labels = window[:, 1:].reshape(-1)
        for key, logits in (("target_loss", p), ("draft_loss", q)):
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels)
            totals[key] += loss.item() * len(window)
        overlap = torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1).mean()
        totals["overlap"] += overlap.item() * len(window)
    return {key: round(total / len(windows), 4) for key, total in totals.items()}


def save(model, tokenizer, folder: Path) -> None:
    """Write a model and its tokenizer into a folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(
    out: Path = typer.Option(Path(__file__).parent / "demo_pair", help="The folder to write."),
    target_steps: int = typer.Option(2400, min=1, help="Training steps of the target."),
    draft_steps: int = typer.Option(2000, min=1, help="Training steps of the draft."),
    vocab_size: int = typer.Option(2048, min=512, help="Tokens of the tokenizer."),
    seed: int = typer.Option(0, help="The same seed gives the same models."),
) -> None:
    """Train a small target and a smaller draft on the Python standard library."""
    with one_line_errors(console):
        check_output_folder("--out", out)
    start = time.monotonic()
    torch.manual_seed(seed)
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(seed)
    train_texts, held_out_texts = read_corpus()
    tokenizer = train_tokenizer(train_texts, vocab_size)
    train, held_out = encode(tokenizer, train_texts), encode(tokenizer, held_out_texts)
    console.print(
        f"{len(train_texts)} files, {len(train):,} tokens to train on; "
        f"{len(held_out_texts)} files, {len(held_out):,} tokens held out"
    )
    target = build("target", len(tokenizer), tokenizer.eos_token_id)
    draft = build("draft", len(tokenizer), tokenizer.eos_token_id)
    target_size, draft_size = target.num_parameters(), draft.num_parameters()
    console.print(f"target {target_size:,} parameters, draft {draft_size:,}")

    columns = (
        TextColumn("{task.description:>6}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        fit("target", target, None, train, target_steps, 3e-3, generator, progress)
        target = (
            target.bfloat16().float().eval()
        )  # what will be stored is what the draft learns from
        progress.console.print(
            f"held-out texts, after training the target: {evaluate(target, draft, held_out)}"
        )
        fit("draft", draft, target, train, draft_steps, 4e-3, generator, progress)
    draft = draft.bfloat16().float().eval()
    card = {
        **evaluate(target, draft, held_out),
        "target_parameters": target_size,
        "draft_parameters": draft_size,
        "vocab_size": len(tokenizer),
        "training_tokens": len(train),
        "held_out_tokens": len(held_out),
        "target_steps": target_steps,
        "draft_steps": draft_steps,
        "tokens_per_step": ROWS * CONTEXT,
        "seed": seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "command": f"python scripts/train_demo_pair.py --seed {seed}",
    }
    save(target.bfloat16(), tokenizer, out / "target")
    save(draft.bfloat16(), tokenizer, out / "draft")
    write_prompts(held_out_texts, out)
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    console.print_json(data=card)

    prompt = tokenizer("def parse_header(line):\n", return_tensors="pt")["input_ids"]
    sample = target.float().generate(
        prompt, max_new_tokens=150, do_sample=True, temperature=0.7, top_k=50
    )
    console.print(tokenizer.decode(sample[0]), markup=False, highlight=False)


if __name__ == "__main__":
    typer.run(main)
