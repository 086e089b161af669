#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Train an EAGLE-3 head for the demo target and write it in the `speculators` format.

EAGLE-3 (arXiv 2503.01840): the head is one decoder layer. At position p it reads the target's
hidden states of three layers at p and the token at p + 1, and drafts the token at p + 2. For deeper
drafts it reads its own output in place of the hidden states, and training does the same
("training-time test"), so that every depth is trained on what it will read. It learns the target's
distribution over the demo pair's training texts, restricted to their most frequent tokens, which
are all that it can draft.

The result is determined by ``--seed``, the versions of Python and PyTorch, and the thread count.
"""

import json
import os
import platform
import time
from collections import Counter
from pathlib import Path

import torch
import typer
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from train_demo_pair import encode, evenly_spaced, fit, progress_bars, read_corpus, windows
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)

from vllm_spechub.measure.preflight import check_output_folder
from vllm_spechub.measure.terminal import one_line_errors

PAIR = Path(__file__).parent / "demo_pair"
AUX_LAYERS = [1, 2, 3]  # the target's states after so many layers: all three
CONTEXT = 256  # rows of the head per training text
TEXTS = 8  # per step
DEPTH_WEIGHT = 0.8  # of a depth's loss, relative to the depth above
console = Console()


class Attention(nn.Module):
    """Attention of one depth's rows to the text, and to the rows from which each was drafted."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        width = self.heads * self.head_dim
        kv_width = self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(2 * config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(
        self,
        # [num_texts, num_rows, 2 * hidden_size]
        inputs: torch.Tensor,
        # of the depths above, [num_texts, heads, num_rows, head_dim] each; this depth's are added
        cache: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """Row p stands at position p + depth. Returns [num_texts, num_rows, hidden_size]."""

        def heads(projection: nn.Linear, count: int) -> torch.Tensor:
            return projection(inputs).unflatten(-1, (count, self.head_dim)).transpose(1, 2)

        num_rows = inputs.shape[1]
        positions = torch.arange(num_rows).unsqueeze(0) + len(cache)
        query, key = apply_rotary_pos_emb(
            heads(self.q_proj, self.heads),
            heads(self.k_proj, self.kv_heads),
            *self.rotary(inputs, positions),
        )
        groups = self.heads // self.kv_heads
        value = heads(self.v_proj, self.kv_heads)
        cache.append((repeat_kv(key, groups), repeat_kv(value, groups)))
        (text_keys, text_values), *drafted = cache
        # the text is what was read at depth 0
        later = torch.ones(num_rows, num_rows, dtype=torch.bool).triu(1)
        scores = [(query @ text_keys.mT).masked_fill(later, -torch.inf)]
        scores += [(query * keys).sum(-1, keepdim=True) for keys, _ in drafted]
        weights = (torch.cat(scores, dim=-1) * self.head_dim**-0.5).softmax(-1)
        seen = weights[..., :num_rows] @ text_values
        for i, (_, values) in enumerate(drafted, start=num_rows):
            seen = seen + weights[..., i : i + 1] * values
        return self.o_proj(seen.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """EAGLE-3's decoder layer: its attention reads the token beside the hidden state."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        norm = (config.hidden_size, config.rms_norm_eps)
        self.hidden_norm, self.input_layernorm = LlamaRMSNorm(*norm), LlamaRMSNorm(*norm)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = LlamaRMSNorm(*norm)
        self.mlp = LlamaMLP(config)

    def forward(self, embeddings: torch.Tensor, hidden: torch.Tensor, cache: list) -> torch.Tensor:
        """[num_texts, num_rows, hidden_size] each, and the result."""
        hidden = self.hidden_norm(hidden)  # before the residual: `norm_before_residual`
        inputs = torch.cat([self.input_layernorm(embeddings), hidden], dim=-1)
        hidden = hidden + self.self_attn(inputs, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Head(nn.Module):
    """An EAGLE-3 head, which shares its target's embeddings.

    Args:
        target: what it drafts for.
        draft_ids: [draft_vocab_size] int64, the tokens that it can draft, ascending.
    """

    def __init__(self, target, draft_ids: torch.Tensor) -> None:
        super().__init__()
        config = self.config = LlamaConfig(**{**target.config.to_dict(), "num_hidden_layers": 1})
        hidden_size = config.hidden_size
        self.draft_ids = draft_ids
        self.embed_tokens = target.get_input_embeddings()
        self.fc = nn.Linear(3 * hidden_size, hidden_size, bias=False)
        self.layers = nn.ModuleList([Layer(config)])
        self.norm = LlamaRMSNorm(hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(hidden_size, len(draft_ids), bias=False)
        with torch.no_grad():  # what reads the target starts as what reads its last layer
            self.fc.weight.mul_(0.1)[:, -hidden_size:] += torch.eye(hidden_size)
            self.norm.weight.copy_(target.model.norm.weight)
            self.lm_head.weight.copy_(target.get_output_embeddings().weight[draft_ids])

    def forward(
        self,
        # [num_texts, num_rows + depths] int64
        tokens: torch.Tensor,
        # [num_texts, at least num_rows, 3 * hidden_size], the target's
        states: torch.Tensor,
        depths: int,
    ) -> list[torch.Tensor]:
        """Read a text as if each of its tokens had been drafted.

        Returns:
            Logits of each depth, [num_texts, num_rows, draft_vocab_size]: row p drafts the token at
            position p + 2 + depth, from the target's states up to p and the tokens up to
            p + 1 + depth.
        """
        num_rows = tokens.shape[1] - depths
        hidden, cache, logits = self.fc(states[:, :num_rows]), [], []
        for depth in range(depths):
            embeddings = self.embed_tokens(tokens[:, 1 + depth : 1 + depth + num_rows])
            hidden = self.layers[0](embeddings, hidden, cache)
            logits.append(self.lm_head(self.norm(hidden)))
        return logits

    @torch.no_grad()
    def read_target(self, target, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states, [num_texts, length, 3 * hidden_size], and probabilities of [.., vocab]."""
        states: list[torch.Tensor] = []
        hooks = [
            target.model.layers[layer - 1].register_forward_hook(
                lambda module, inputs, output: states.append(output)
            )
            for layer in AUX_LAYERS
        ]
        logits = target(input_ids=tokens).logits
        for hook in hooks:
            hook.remove()
        return torch.cat(states, dim=-1), logits.float().softmax(-1)


def frequent_tokens(stream: torch.Tensor, count: int) -> torch.Tensor:
    """The ids of the most frequent tokens, ascending. Returns [count] int64."""
    common = Counter(stream.tolist()).most_common(count)
    return torch.tensor(sorted(token for token, _ in common))


def distillation_loss(head: Head, target, depths: int):
    """The weighted cross entropy of all depths against the target's law on the draft's tokens."""
    weights = torch.tensor([DEPTH_WEIGHT**depth for depth in range(depths)])
    weights /= weights.sum()

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            states, probs = head.read_target(target, tokens)
            logits = head(tokens, states, depths)
        wanted = probs[:, :, head.draft_ids]
        total = torch.zeros(())
        for depth, (weight, row) in enumerate(zip(weights, logits, strict=True)):
            law = wanted[:, 1 + depth : 1 + depth + row.shape[1]]
            total = total - weight * (law * row.float().log_softmax(-1)).sum(-1).mean()
        return total

    return loss


@torch.no_grad()
def overlaps(head: Head, target, texts: torch.Tensor, depths: int) -> list[float]:
    """The mean of sum_i min(p_i, q_i) at T = 1, of each depth, below the text's own tokens."""
    totals = torch.zeros(depths)
    for tokens in texts.split(TEXTS):
        states, probs = head.read_target(target, tokens)
        for depth, logits in enumerate(head(tokens, states, depths)):
            p = probs[:, 1 + depth : 1 + depth + logits.shape[1], head.draft_ids]
            totals[depth] += torch.minimum(p, logits.softmax(-1)).sum(-1).mean(-1).sum()
    return [round(total, 4) for total in (totals / len(texts)).tolist()]


@torch.no_grad()
def greedy_chain(head: Head, target, prompts: list[torch.Tensor], depths: int, length: int) -> dict:
    """What a chain does at temperature 0, step by step, over `length` tokens for each prompt."""
    steps, accepted = 0, torch.zeros(depths, dtype=torch.int64)
    for prompt in prompts:
        text = target.generate(
            prompt.unsqueeze(0),
            attention_mask=torch.ones_like(prompt).unsqueeze(0),
            min_new_tokens=length + depths + 1,
            max_new_tokens=length + depths + 1,
            do_sample=False,
        )
        states, _ = head.read_target(target, text)
        # the last rows' drafts are past the end of the text
        tokens = nn.functional.pad(text, (0, depths))
        drafted = [head.draft_ids[row.argmax(-1)[0]] for row in head(tokens, states, depths)]
        root = len(prompt)  # the position of the last token that is known
        while root < len(prompt) + length - 1:
            hits = [int(drafted[i][root - 1] == text[0, root + 1 + i]) for i in range(depths)]
            taken = torch.tensor(hits).cumprod(0)
            accepted += taken
            steps += 1
            root += 1 + int(taken.sum())
    return {
        "steps": steps,
        "accepted_by_depth": accepted.tolist(),
        "tokens_per_step": round(1 + accepted.sum().item() / steps, 4),
    }


def save(head: Head, depths: int, folder: Path) -> None:
    """Write the head's configuration and weights, in bfloat16."""
    ids, vocab_size = head.draft_ids, head.config.vocab_size
    tensors = {name: tensor.bfloat16() for name, tensor in head.state_dict().items()}
    tensors["d2t"] = ids - torch.arange(len(ids))
    tensors["t2d"] = torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)
    layer = json.loads((PAIR / "target" / "config.json").read_text())
    layer |= {"num_hidden_layers": 1, "tie_word_embeddings": False}
    proposal = {"proposal_type": "greedy", "speculative_tokens": depths}
    config = {
        "architectures": ["Eagle3Speculator"],
        "draft_vocab_size": len(ids),
        "dtype": "bfloat16",
        "eagle_aux_hidden_state_layer_ids": AUX_LAYERS,
        "norm_before_residual": True,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {
                "architectures": ["LlamaForCausalLM"],
                "name_or_path": os.path.relpath(PAIR / "target"),
            },
        },
        "speculators_model_type": "eagle3",
        "target_hidden_size": head.config.hidden_size,
        "transformer_layer_config": layer,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main(
    out: Path = typer.Option(PAIR / "eagle3", help="The folder to write."),
    steps: int = typer.Option(400, min=1, help="Training steps."),
    depths: int = typer.Option(4, min=1, help="Depths that are trained."),
    draft_vocab_size: int = typer.Option(1024, min=1, help="Tokens that the head can draft."),
    seed: int = typer.Option(0, help="The same seed gives the same head."),
) -> None:
    """Train an EAGLE-3 head for the demo target on the Python standard library."""
    with one_line_errors(console):
        check_output_folder("--out", out)
    start = time.process_time()
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # these operations are too small to share
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    target = AutoModelForCausalLM.from_pretrained(PAIR / "target", dtype=torch.float32).eval()
    target.requires_grad_(False)
    train, held_out = (encode(tokenizer, texts) for texts in read_corpus())
    head = Head(target, frequent_tokens(train, draft_vocab_size))
    coverage = torch.isin(held_out, head.draft_ids).double().mean().item()
    trained = sum(p.numel() for p in head.parameters() if p.requires_grad)
    console.print(f"{trained:,} parameters; it can draft {coverage:.1%} of the held-out tokens")

    generator = torch.Generator().manual_seed(seed)
    batches = windows(train, TEXTS, CONTEXT + depths, generator)
    with progress_bars() as progress:
        fit("head", head, distillation_loss(head, target, depths), batches, steps, 4e-3, progress)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(parameter.bfloat16())  # what is stored
    lines = (PAIR / "prompts.jsonl").read_text().splitlines()
    prompts = [torch.tensor(tokenizer(json.loads(line)["turns"][0]).input_ids) for line in lines]
    texts = evenly_spaced(held_out, CONTEXT + depths, 200)
    length = 64
    card = {
        "overlap_by_depth": overlaps(head, target, texts, depths),
        "greedy_chain": {"tokens": length, **greedy_chain(head, target, prompts, depths, length)},
        "parameters": trained,
        "draft_vocab_size": draft_vocab_size,
        "draft_vocab_coverage": round(coverage, 4),
        "steps": steps,
        "tokens_per_step": TEXTS * CONTEXT,
        "depths": depths,
        "seed": seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_minutes": round((time.process_time() - start) / 60, 1),
        "command": f"python scripts/train_eagle_head.py --steps {steps} --seed {seed}",
    }
    save(head, depths, out)
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    console.print_json(data=card)


if __name__ == "__main__":
    typer.run(main)
