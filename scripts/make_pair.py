#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Make a pair of Llama models of real sizes, with random weights and a chosen overlap.

    python scripts/make_pair.py pair --target 8b --draft 1b --overlap 0.7

The draft is part of the target: its residual stream is the first part of the target's, and its
blocks are corners of the target's, which the rest of the target reads but does not disturb. The
target's logits are the draft's logits times cos(a) and others times sin(a), so the angle a sets
the overlap, the mean of sum(min(p, q)) at T = 1, and the draft's final norm sets the entropy. Both
are found by bisection on the last hidden states of sampled texts. Weights are made, used and
written one layer at a time. Overlap is set on texts of random tokens; on texts that the target has
sampled it may be a few hundredths off.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Shape:
    """A Llama model's sizes."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int = 128256

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


SHAPES = {
    "8b": Shape(4096, 32, 32, 8, 128, 14336),
    "1b": Shape(2048, 16, 32, 8, 64, 8192),
    "0.1b": Shape(512, 12, 8, 2, 64, 1536),
    "150m": Shape(1024, 12, 16, 4, 64, 2816, vocab=8192),
    "4m": Shape(256, 2, 4, 1, 64, 704, vocab=8192),
    "8b-tiny": Shape(192, 4, 4, 2, 48, 528, vocab=2048),
    "1b-tiny": Shape(96, 2, 2, 1, 24, 264, vocab=2048),
}
"""Llama 3.1 8B and Llama 3.2 1B, a tenth of the latter, a pair for a CPU and one for a test."""
ROPE_THETA, EPS = 500000.0, 1e-5
QUIET = 2.0**-7
"""Size of the target's own part of the residual stream, beside the draft's. It is too small to
disturb the norms; where it is read, the norms' weights make up for it."""
QUERY_GAIN = 3.0
"""Makes attention choose among tokens rather than average over them."""
TEXTS, TEXT_TOKENS = 8, 64
"""The number and length of the texts on which overlap and entropy are set."""


def config_of(shape: Shape, eps: float, tied: bool):
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=eps,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
    )


def check_fit(target: Shape, draft: Shape) -> None:
    """Raises ValueError unless the draft's blocks fit into corners of the target's."""
    fits = {
        "a larger hidden size": target.hidden > draft.hidden,
        "at least as many layers": target.layers >= draft.layers,
        "at least as many key-value heads": target.kv_heads >= draft.kv_heads,
        "at least as many heads per key-value head": target.group >= draft.group,
        "a head size that is a multiple of the draft's": target.head_dim % draft.head_dim == 0,
        "an MLP at least as large": target.mlp >= draft.mlp,
        "the same vocabulary size": target.vocab == draft.vocab,
    }
    for what, holds in fits.items():
        if not holds:
            raise ValueError(f"the draft does not fit into the target: the target needs {what}")


class Maker:
    """Random weights of both models; equal seeds and devices give equal weights."""

    def __init__(self, target: Shape, draft: Shape, seed: int, device: str) -> None:
        check_fit(target, draft)
        self.target, self.draft = target, draft
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)
        # where the draft's layers are in the target
        self.places = {i * target.layers // draft.layers: i for i in range(draft.layers)}

    def random(self, rows: int, columns: int, scale: float) -> torch.Tensor:
        weight = torch.randn(rows, columns, generator=self.generator, device=self.device)
        return weight.mul_(scale).to(torch.bfloat16)

    def draft_layer(self) -> dict[str, torch.Tensor]:
        s = self.draft
        inner, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        one = torch.ones(s.hidden, dtype=torch.bfloat16, device=self.device)
        return {
            "input_layernorm": one,
            "post_attention_layernorm": one.clone(),
            "self_attn.q_proj": self.random(inner, s.hidden, QUERY_GAIN * s.hidden**-0.5),
            "self_attn.k_proj": self.random(kv, s.hidden, s.hidden**-0.5),
            "self_attn.v_proj": self.random(kv, s.hidden, s.hidden**-0.5),
            "self_attn.o_proj": self.random(s.hidden, inner, inner**-0.5),
            "mlp.gate_proj": self.random(s.mlp, s.hidden, s.hidden**-0.5),
            "mlp.up_proj": self.random(s.mlp, s.hidden, s.hidden**-0.5),
            "mlp.down_proj": self.random(s.hidden, s.mlp, s.mlp**-0.5),
        }

    def norm(self, ours: float = 1.0, own: float = 1.0) -> torch.Tensor:
        """A norm of the target that gives the draft's part what the draft's norm gives, times
        `ours`, and its own part, which is quiet in the residual stream, as much, times `own`."""
        small, whole = self.draft.hidden, self.target.hidden
        weight = torch.full((whole,), (small / whole) ** 0.5, device=self.device)
        weight[:small] *= ours
        weight[small:] *= own / QUIET
        return weight

    def target_layer(self, corner: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """A layer of the target that holds a layer of the draft, or none."""
        t, d = self.target, self.draft
        inner, kv, small = t.heads * t.head_dim, t.kv_heads * t.head_dim, d.hidden
        read, norm = t.hidden**-0.5, self.norm().to(torch.bfloat16)
        # The norms do not keep the target's own part small, so its layers must write little.
        write = QUIET * t.layers**-0.5
        layer = {
            "input_layernorm": norm,
            "post_attention_layernorm": norm.clone(),
            "self_attn.q_proj": self.random(inner, t.hidden, QUERY_GAIN * read),
            "self_attn.k_proj": self.random(kv, t.hidden, read),
            "self_attn.v_proj": self.random(kv, t.hidden, read),
            "self_attn.o_proj": self.random(t.hidden, inner, write * inner**-0.5),
            "mlp.gate_proj": self.random(t.mlp, t.hidden, read),
            "mlp.up_proj": self.random(t.mlp, t.hidden, read),
            "mlp.down_proj": self.random(t.hidden, t.mlp, write * t.mlp**-0.5),
        }
        # Nothing but the draft's block writes to the draft's part of the stream ..
        layer["self_attn.o_proj"][:small] = 0
        layer["mlp.down_proj"][:small] = 0
        if corner is None:
            return layer
        # .. and that block reads nothing else.
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            layer[name][: d.mlp] = 0
            layer[name][: d.mlp, :small] = corner[name]
        layer["mlp.down_proj"][:small, : d.mlp] = corner["mlp.down_proj"]
        q, k, v = self.head_rows()
        for name, rows, whole_heads in (
            ("self_attn.q_proj", q, self.rows_of(self.query_heads())),
            ("self_attn.k_proj", k, self.rows_of(range(d.kv_heads))),
            ("self_attn.v_proj", v, v),
        ):
            layer[name][whole_heads] = 0  # what is not the draft's of its heads adds no score
            layer[name][rows, :small] = corner[name]
        # scores are divided by the root of the head size
        layer["self_attn.q_proj"][q] *= (t.head_dim / d.head_dim) ** 0.5
        layer["self_attn.o_proj"][:small, self.value_columns()] = corner["self_attn.o_proj"]
        return layer

    def query_heads(self) -> list[int]:
        """The target's head for each head of the draft."""
        group = self.draft.group
        return [h // group * self.target.group + h % group for h in range(self.draft.heads)]

    def rows_of(self, heads) -> torch.Tensor:
        """All rows of some of the target's heads."""
        rows = torch.tensor(list(heads)).unsqueeze(1) * self.target.head_dim
        return (rows + torch.arange(self.target.head_dim)).flatten()

    def head_rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The target's rows for the draft's rows of queries, keys and values.

        Rotary embeddings turn dimension i with dimension i + head_dim / 2, slower for larger i: the
        draft's frequencies are evenly spaced among the target's.
        """
        t, d = self.target.head_dim, self.draft.head_dim
        slow = torch.arange(d // 2) * (t // d)
        rotary = torch.cat([slow, slow + t // 2])
        queries = torch.tensor(self.query_heads()).unsqueeze(1) * t
        keys = torch.arange(self.draft.kv_heads).unsqueeze(1) * t
        return (
            (queries + rotary).flatten(),
            (keys + rotary).flatten(),
            (keys + torch.arange(d)).flatten(),
        )

    def value_columns(self) -> torch.Tensor:
        queries = torch.tensor(self.query_heads()).unsqueeze(1) * self.target.head_dim
        return (queries + torch.arange(self.draft.head_dim)).flatten()


class Reader:
    """Hidden states of the texts in one model, carried through its layers as they are made."""

    def __init__(self, config, hidden: torch.Tensor) -> None:
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        config._attn_implementation = "sdpa"
        self.hidden = hidden
        with torch.device(hidden.device):
            self.layer = LlamaDecoderLayer(config, 0).to(hidden.dtype).eval()
            positions = torch.arange(hidden.shape[1]).unsqueeze(0)
            self.rotary = LlamaRotaryEmbedding(config)(hidden, positions)

    @torch.inference_mode()
    def read(self, weights: dict[str, torch.Tensor]) -> None:
        self.layer.load_state_dict({f"{name}.weight": w for name, w in weights.items()})
        self.hidden = self.layer(self.hidden, position_embeddings=self.rotary)


def normed(hidden: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise [num_texts, length, hidden] to a root mean square of 1. [num_positions, hidden]"""
    flat = hidden.flatten(0, 1).float()
    return flat * torch.rsqrt(flat.square().mean(dim=1, keepdim=True) + eps)


def bisect(function: Callable[[float], float], low: float, high: float, wanted: float) -> float:
    """Find where a decreasing function has a value. Raises ValueError if it never has it."""
    if not function(high) <= wanted <= function(low):
        raise ValueError(
            f"{wanted:g} is out of reach, allowed: {function(high):.2f} to {function(low):.2f}"
        )
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > wanted else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Mixture:
    """How the target mixes the draft's logits with its own: an angle and a size, and the result."""

    angle: float
    size: float
    overlap: float
    # nats, of the target
    entropy: float


def find_mixture(
    # [num_positions, vocab_size] each, of size 1
    shared: torch.Tensor,
    own: torch.Tensor,
    overlap: float,
    entropy: float,
) -> Mixture:
    """Find the angle and size that give the draft this entropy and the pair this overlap."""

    def entropy_of(logits: torch.Tensor) -> float:
        return float(torch.distributions.Categorical(logits=logits).entropy().mean())

    size = bisect(lambda size: entropy_of(size * shared), 0.0, 16.0, entropy)
    draft = torch.softmax(size * shared, dim=1)

    def target(angle: float) -> torch.Tensor:
        return size * (math.cos(angle) * shared + math.sin(angle) * own)

    def overlap_of(angle: float) -> float:
        return float(torch.minimum(torch.softmax(target(angle), dim=1), draft).sum(dim=1).mean())

    angle = bisect(overlap_of, 0.0, math.pi / 2, overlap)
    return Mixture(angle, size, overlap_of(angle), entropy_of(target(angle)))


class Writer:
    """A model's folder, one file for each part that is made."""

    def __init__(self, folder: Path, config) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        self.folder, self.files = folder, {}

    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        name = f"model-{len(set(self.files.values())):03}.safetensors"
        save_file(
            {key: tensor.to("cpu", torch.bfloat16) for key, tensor in tensors.items()},
            self.folder / name,
            {"format": "pt"},
        )
        self.files |= dict.fromkeys(tensors, name)

    def write_layer(self, number: int, weights: dict[str, torch.Tensor]) -> None:
        prefix = f"model.layers.{number}."
        self.write({f"{prefix}{name}.weight": weight for name, weight in weights.items()})

    def close(self) -> None:
        index = {"metadata": {}, "weight_map": self.files}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer with a word for each token, so that prompts and answers are readable."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="t0", bos_token="t0", eos_token="t0"
    ).save_pretrained(folder)


def write_prompts(file: Path, texts: torch.Tensor) -> None:
    """Write texts [num_texts, length] as JSON lines."""
    lines = (json.dumps({"prompt": " ".join(f"t{t}" for t in text)}) for text in texts.tolist())
    file.write_text("".join(f"{line}\n" for line in lines))


@torch.inference_mode()
def make(
    out: Path,
    target: Shape,
    draft: Shape,
    overlap: float,
    entropy: float,
    seed: int,
    device: str,
) -> Iterator[int]:
    """Write `target`, `draft` and `prompts.jsonl` into a folder, yielding after each layer.

    Raises:
        ValueError: the shapes do not fit, or overlap or entropy are out of reach.
    """
    maker = Maker(target, draft, seed, device)
    small, whole, vocab = draft.hidden, target.hidden, draft.vocab
    # With this the two norms agree on the draft's part of the stream.
    configs = config_of(target, EPS * small / whole, False), config_of(draft, EPS, True)
    writers = [Writer(out / name, c) for name, c in zip(("target", "draft"), configs, strict=True)]
    texts = torch.randint(1, vocab, (TEXTS, TEXT_TOKENS), generator=maker.generator, device=device)
    for writer in writers:
        write_tokenizer(writer.folder, vocab)
    write_prompts(out / "prompts.jsonl", texts)

    embedding = maker.random(vocab, small, 1.0)
    whole_embedding = torch.cat([embedding, maker.random(vocab, whole - small, QUIET)], dim=1)
    writers[0].write({"model.embed_tokens.weight": whole_embedding})
    readers = [
        Reader(config, rows[texts].float())
        for config, rows in zip(configs, (whole_embedding, embedding), strict=True)
    ]
    del whole_embedding
    for number in range(target.layers):
        corner = None
        if number in maker.places:
            corner = maker.draft_layer()
            readers[1].read(corner)
            writers[1].write_layer(maker.places[number], corner)
        layer = maker.target_layer(corner)
        readers[0].read(layer)
        writers[0].write_layer(number, layer)
        del layer
        yield number

    # Signs keep a token from being its own most likely successor, as rows of `embedding` are both.
    signs = torch.randint(0, 2, (small,), generator=maker.generator, device=device) * 2.0 - 1
    head = maker.random(vocab, whole - small, 1.0)
    states = normed(readers[0].hidden, configs[0].rms_norm_eps) * maker.norm()
    size = states[:, small:].square().mean().sqrt()
    ours, own = small**-0.5, (whole - small) ** -0.5 / float(size)
    shared = (states[:, :small] * signs * ours) @ embedding.float().T
    others = (states[:, small:] * own) @ head.float().T
    mixture = find_mixture(shared, others, overlap, entropy)

    writers[1].write(
        {"model.embed_tokens.weight": embedding, "model.norm.weight": mixture.size * ours * signs}
    )
    final = maker.norm(
        mixture.size * ours * math.cos(mixture.angle), mixture.size * own * math.sin(mixture.angle)
    )
    final[:small] *= signs
    writers[0].write(
        {"model.norm.weight": final, "lm_head.weight": torch.cat([embedding, head], dim=1)}
    )
    for writer in writers:
        writer.close()
    card = {
        "target": asdict(target),
        "draft": asdict(draft),
        "seed": seed,
        "device": device,
        "asked": {"overlap": overlap, "draft_entropy_nats": entropy},
        "measured": {"overlap": mixture.overlap, "target_entropy_nats": mixture.entropy},
    }
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def make_pair(
    out: Path, target: str, draft: str, overlap: float, entropy: float, seed: int
) -> None:
    """Make a pair from the names of its shapes, and show the progress."""
    for name in (target, draft):
        if name not in SHAPES:
            raise ValueError(f"{name!r} is not a size, allowed: {', '.join(SHAPES)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = SHAPES[target], SHAPES[draft]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(f"making {target} and {draft}, layers", total=shapes[0].layers)
        for _ in make(out, *shapes, overlap, entropy, seed, device):
            progress.advance(task)
    console.print(f"{out}: {json.loads((out / 'card.json').read_text())['measured']}")


def main(
    out: Annotated[Path, typer.Argument(help="The folder for target, draft and prompts.jsonl.")],
    target: Annotated[
        str, typer.Option(help=f"The size of the target: {', '.join(SHAPES)}.")
    ] = "8b",
    draft: Annotated[
        str, typer.Option(help="The size of the draft, one of the same sizes.")
    ] = "1b",
    overlap: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The mean of sum(min(p, q)) at T = 1.")
    ] = 0.7,
    entropy: Annotated[
        float,
        typer.Option(min=0.0, help="The entropy of the draft's next token at T = 1, in nats."),
    ] = 2.5,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same models.")] = 0,
) -> None:
    """Make a pair of Llama models with random weights and a chosen overlap."""
    try:
        make_pair(out, target, draft, overlap, entropy, seed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
