# SPDX-License-Identifier: Apache-2.0
"""Heads for tests, and what they compute, in plain PyTorch on transformers' hidden states."""

import json
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import (
    LlamaConfig,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)

from helpers.models import qwen2
from helpers.oracle import reference_model, tokens_of
from helpers.pair import PROMPTS, TARGET
from vllm_spechub.rules.grown_trees import static_tree

AUX_LAYERS = [1, 2, 3]
DRAFT_VOCABULARY = 1024


def folder_of(folder: Path, config: dict, weights: dict[str, torch.Tensor]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def target_config() -> dict:
    return json.loads((Path(TARGET) / "config.json").read_text())


def texts(num: int = 24, length: int = 96) -> torch.Tensor:
    """Texts that the demo target itself samples. [num, length] int64"""
    torch.manual_seed(0)
    prompt = torch.tensor([tokens_of(PROMPTS[4])[:8]] * num)
    return reference_model().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        pad_token_id=0,
        do_sample=True,
        max_new_tokens=length,
        min_new_tokens=length,
        top_k=0,
    )


def layer_outputs(tokens: torch.Tensor) -> list[torch.Tensor]:
    """The demo target's residual stream after each layer, [num, length, hidden_size] each."""
    streams: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: streams.append(output))
        for layer in reference_model().model.layers
    ]
    reference_model()(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return streams


def fitted(
    inputs: torch.Tensor,  # [num_rows, num_inputs]
    outputs: torch.Tensor,  # [num_rows, num_outputs]
) -> torch.Tensor:
    """The matrix that maps rows best, with a small ridge. [num_outputs, num_inputs]"""
    square = inputs.T @ inputs
    square += 1e-2 * square.diagonal().mean() * torch.eye(len(square))
    return torch.linalg.solve(square, inputs.T @ outputs).T


def random_layer(prefix: str, config: dict, scale: float, bias: bool = False) -> dict:
    """The weights of an ordinary layer that adds little to the residual stream, but not nothing."""
    hidden, heads = config["hidden_size"], config["head_dim"]
    queries, keys = (config[f"num_{kind}_heads"] * heads for kind in ("attention", "key_value"))
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (config["intermediate_size"], hidden),
        "mlp.up_proj": (config["intermediate_size"], hidden),
        "mlp.down_proj": (hidden, config["intermediate_size"]),
    }
    weights = {
        f"{prefix}{name}.weight": torch.randn(shape) / shape[1] ** 0.5
        for name, shape in shapes.items()
    }
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"{prefix}{name}.weight"] *= scale
    for name in ("q_proj", "k_proj", "v_proj") if bias else ():
        weights[f"{prefix}self_attn.{name}.bias"] = torch.zeros(
            len(weights[f"{prefix}self_attn.{name}.weight"])
        )
    return weights


def eagle3(folder: Path, form: str = "speculators", ids: torch.Tensor | None = None) -> str:
    """An EAGLE-3 head of the demo target for half of its vocabulary.

    Its queries and keys find the same token, so that its attention is nearly a function of the
    token, and with the fusing layer it is fitted to the target.

    Args:
        form: "speculators", or "first" for the format of EAGLE's authors: another configuration and
            other names, no embedding, and the residual is taken before the norm.
        ids: [draft_vocab_size] int64, the tokens that it can draft, ascending.
    """
    model, tokens = reference_model(), texts()
    streams, embeddings = layer_outputs(tokens), model.get_input_embeddings()
    states = torch.cat(streams, dim=-1)[:, :-2]
    inputs = torch.cat([states, normed(embeddings(tokens[:, 1:-1]))], dim=-1)
    wanted = normed(streams[-1][:, 1:-1])
    joined = fitted(inputs.flatten(0, 1), wanted.flatten(0, 1))
    config = target_config() | {"num_hidden_layers": 1, "tie_word_embeddings": False}
    size, head_dim = config["hidden_size"], config["head_dim"]
    fc, by_token = joined[:, : 3 * size], joined[:, 3 * size :]
    left, scales, right = torch.linalg.svd(by_token)
    rank = config["num_key_value_heads"] * head_dim
    torch.manual_seed(2)
    same = torch.randn(head_dim, size) * (120 / head_dim / size) ** 0.5
    silent = torch.zeros(rank, size)
    output = (left * scales)[:, :rank].unflatten(1, (-1, head_dim))
    groups = config["num_attention_heads"] // config["num_key_value_heads"]
    prefix = "layers.0." if form == "speculators" else "midlayer."
    weights = random_layer(prefix, config, 0.1) | {
        f"{prefix}self_attn.q_proj.weight": torch.cat(
            [same.repeat(config["num_attention_heads"], 1), silent.repeat(groups, 1)], dim=1
        ),
        f"{prefix}self_attn.k_proj.weight": torch.cat(
            [same.repeat(config["num_key_value_heads"], 1), silent], dim=1
        ),
        f"{prefix}self_attn.v_proj.weight": torch.cat([right[:rank], silent], dim=1),
        # each value head is read by a group of query heads
        f"{prefix}self_attn.o_proj.weight": output.repeat_interleave(groups, 1).flatten(1) / groups,
    }
    for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
        weights[f"{prefix}{name}.weight"] = torch.ones(size)
    if ids is None:
        common = torch.bincount(tokens.flatten(), minlength=config["vocab_size"])
        common[[0, -1]] = 1 << 20  # both ends of the vocabulary
        ids = common.topk(DRAFT_VOCABULARY).indices.sort().values
    weights |= {
        "fc.weight": fc,
        "norm.weight": model.model.norm.weight,
        "lm_head.weight": embeddings.weight[ids],
        "d2t": ids - torch.arange(len(ids)),
        "t2d": torch.isin(torch.arange(config["vocab_size"]), ids),
    }
    own = {"draft_vocab_size": len(ids), "eagle_aux_hidden_state_layer_ids": AUX_LAYERS}
    if form == "first":
        own |= {"architectures": ["LlamaForCausalLMEagle3"]}
        # fewer positions than are used, as published
        return folder_of(folder, config | own | {"max_position_embeddings": 64}, weights)
    weights["embed_tokens.weight"] = embeddings.weight
    proposals = [{"proposal_type": "greedy", "speculative_tokens": 3}]
    verifier = {"name_or_path": TARGET, "architectures": ["LlamaForCausalLM"]}
    own |= {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {"proposal_methods": proposals, "verifier": verifier},
        "norm_before_residual": True,
        "transformer_layer_config": config,
    }
    return folder_of(folder, own, weights)


def eagle1(folder: Path) -> str:
    """An EAGLE head of the demo target that calls itself a Llama, as the first ones did. Its
    fusing layer is fitted to the target, the rest is random."""
    model, tokens = reference_model(), texts()
    hidden = model.model(input_ids=tokens).last_hidden_state
    embeddings = model.get_input_embeddings()(tokens)
    inputs = torch.cat([embeddings[:, 1:-1], hidden[:, :-2]], dim=-1).flatten(0, 1)
    torch.manual_seed(2)
    config = target_config() | {"num_hidden_layers": 1}
    weights = random_layer("layers.0.", config, 0.3 * float(hidden.std()))
    weights["fc.weight"] = fitted(inputs, hidden[:, 1:-1].flatten(0, 1))
    weights["layers.0.post_attention_layernorm.weight"] = torch.ones(config["hidden_size"])
    return folder_of(folder, config, weights)


def mimo(folder: Path) -> str:
    """The demo target as a MiMo with an MTP layer, which is made as `eagle1` makes its head."""
    model, tokens = reference_model(), texts()
    stream = layer_outputs(tokens)[-1]  # what vLLM's MiMo gives: it is not normed
    embeddings = model.get_input_embeddings()(tokens)
    inputs = torch.cat([normed(stream[:, :-2]), normed(embeddings[:, 1:-1])], dim=-1)
    torch.manual_seed(2)
    qwen2(folder, TARGET)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    prefix, ones = "model.mtp_layers.0.", torch.ones(config["hidden_size"])
    weights = random_layer(prefix, config, 0.2, bias=True)
    outputs = normed(stream[:, 1:-1]).flatten(0, 1)
    weights[f"{prefix}input_proj.weight"] = fitted(inputs.flatten(0, 1), outputs)
    weights[f"{prefix}final_layernorm.weight"] = model.model.norm.weight.clone()
    for name in ("token", "hidden", "input", "post_attention"):
        weights[f"{prefix}{name}_layernorm.weight"] = ones.clone()
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    own = load_file(file)
    save_file(own | {n: w.to(torch.bfloat16) for n, w in weights.items()}, file, {"format": "pt"})
    return str(folder)


def glm4_moe(folder: Path) -> str:
    """A tiny random GLM-4.5, whose last layer once more, with small weights, is its MTP layer."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        rms_norm_eps=1e-5,
        first_k_dense_replace=1,
        initializer_range=0.1,
        max_position_embeddings=1024,
        num_nextn_predict_layers=1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    Glm4MoeForCausalLM(config).float().save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    last = {n: w for n, w in weights.items() if n.startswith("model.layers.1.")}
    mtp = {n.replace("layers.1.", "layers.2."): w.clone() for n, w in last.items()}
    size, prefix = config.hidden_size, "model.layers.2."
    mtp[f"{prefix}eh_proj.weight"] = torch.cat([0.5 * torch.eye(size), torch.eye(size)], dim=1)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        mtp[f"{prefix}{name}.weight"] = 0.5 + torch.rand(size)
    save_file(weights | mtp, file, {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TARGET) / name, folder)
    return str(folder)


def normed(
    rows: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6
) -> torch.Tensor:
    """RMS norm. [..., size]"""
    rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
    return rows if weight is None else rows * weight


@dataclass
class Oracle:
    """What a head of the demo target must give for any node, from the definitions.

    `kind` is "eagle3", "eagle" or "mtp", and `folder` the head's; an MTP layer's is its target's.
    """

    kind: str
    folder: str
    weights: dict[str, torch.Tensor] = field(init=False)
    config: dict = field(init=False)

    def __post_init__(self) -> None:
        loaded = load_file(Path(self.folder) / "model.safetensors")
        self.weights = {
            name.replace("midlayer.", "layers.0.").removeprefix("model.mtp_layers.0."): (
                tensor if tensor.dtype in (torch.int64, torch.bool) else tensor.float()
            )
            for name, tensor in loaded.items()
        }
        config = json.loads((Path(self.folder) / "config.json").read_text())
        # the format says what it means if it says nothing
        before = config.get("norm_before_residual", "speculators_model_type" in config)
        self.config = config.get("transformer_layer_config", {}) | config
        self.config["norm_before_residual"] = before

    @cached_property
    def rotary(self) -> Callable:
        options = {key: self.config[key] for key in ("hidden_size", "head_dim", "rope_parameters")}
        heads = self.config["num_attention_heads"]
        return LlamaRotaryEmbedding(LlamaConfig(num_attention_heads=heads, **options))

    def linear(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        bias = self.weights.get(f"{name}.bias")
        return torch.nn.functional.linear(rows, self.weights[f"{name}.weight"], bias)

    def target_states(self, tokens: list[int]) -> torch.Tensor:
        """What is fed of the target's hidden states. [num_tokens, hidden_size]"""
        streams = layer_outputs(torch.tensor([tokens]))
        if self.kind == "eagle":
            return reference_model().model.norm(streams[-1])[0]
        if self.kind == "mtp":
            return streams[-1][0]
        layers = self.config["eagle_aux_hidden_state_layer_ids"]
        return self.linear("fc", torch.cat([streams[i - 1][0] for i in sorted(layers)], dim=-1))

    def attention(self, prefix: str, rows: torch.Tensor) -> torch.Tensor:
        """Causal attention over all rows. [num_rows, hidden_size]"""
        size = self.config["head_dim"]
        query, key, value = (
            self.linear(f"{prefix}self_attn.{name}_proj", rows)
            .unflatten(-1, (-1, size))
            .transpose(0, 1)[None]
            for name in "qkv"
        )
        cos, sin = self.rotary(rows, torch.arange(len(rows))[None])
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        groups = query.shape[1] // key.shape[1]
        seen = torch.nn.functional.scaled_dot_product_attention(
            query, repeat_kv(key, groups), repeat_kv(value, groups), is_causal=True
        )
        return self.linear(f"{prefix}self_attn.o_proj", seen[0].transpose(0, 1).flatten(1))

    def mlp(self, prefix: str, rows: torch.Tensor) -> torch.Tensor:
        gate, up = (self.linear(f"{prefix}mlp.{name}_proj", rows) for name in ("gate", "up"))
        return self.linear(f"{prefix}mlp.down_proj", torch.nn.functional.silu(gate) * up)

    def norm(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return normed(rows, self.weights.get(f"{name}.weight"))

    def forward(
        self,
        fed: torch.Tensor,  # [num_rows, hidden_size]
        tokens: list[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head gives for its logits and as feedback. [num_rows, hidden_size] each"""
        embeddings = reference_model().get_input_embeddings()(torch.tensor(tokens))
        if self.kind == "eagle3":
            norm, prefix = self.norm("layers.0.hidden_norm", fed), "layers.0."
            stream = norm if self.config["norm_before_residual"] else fed
            rows = torch.cat([self.norm("layers.0.input_layernorm", embeddings), norm], dim=-1)
        elif self.kind == "eagle":
            rows = stream = self.linear("fc", torch.cat([embeddings, fed], dim=-1))
            prefix = "layers.0."
        else:
            embeddings[0] = 0
            parts = self.norm("hidden_layernorm", fed), self.norm("token_layernorm", embeddings)
            stream, prefix = self.linear("input_proj", torch.cat(parts, dim=-1)), ""
            rows = self.norm("input_layernorm", stream)
        stream = stream + self.attention(prefix, rows)
        stream = stream + self.mlp(prefix, self.norm(f"{prefix}post_attention_layernorm", stream))
        if self.kind == "eagle":
            return stream, stream
        last = self.norm("norm" if self.kind == "eagle3" else "final_layernorm", stream)
        return last, stream if self.kind == "eagle3" else last

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """[num_rows, vocab_size of the target], -inf where the head has no token"""
        if self.kind != "eagle3":
            return reference_model().get_output_embeddings()(rows)
        own = self.linear("lm_head", rows)
        tokens = torch.arange(own.shape[1]) + self.weights.get("d2t", 0)
        found = own.new_full((len(own), self.config["vocab_size"]), -torch.inf)
        found[:, tokens] = own
        return found

    def row(self, text: list[int], path: tuple[int, ...]) -> torch.Tensor:
        """The logits at a node whose ancestors below the root, the text's last token, and itself
        are `path`. [vocab_size]"""
        fed, tokens = self.target_states(text[:-1]), text[1:]
        for_logits, feedback = self.forward(fed, tokens)
        for token in path:
            fed, tokens = torch.cat([fed, feedback[-1:]]), [*tokens, token]
            for_logits, feedback = self.forward(fed, tokens)
        return self.logits(for_logits[-1:])[0]


class GlmOracle:
    """As `Oracle`, of the MTP layer of a GLM-4.5 of `glm4_moe`: its experts are transformers'."""

    def __init__(self, folder: str) -> None:
        from transformers import Glm4MoeForCausalLM

        # the MTP layer's block has the names of one more ordinary layer
        self.model, whole = (
            Glm4MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, num_hidden_layers=n)
            for n in (2, 3)
        )
        self.block, self.rotary = whole.model.layers[2], whole.model.rotary_emb
        self.weights = load_file(Path(folder) / "model.safetensors")

    def norm(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return normed(rows, self.weights[f"model.layers.2.{name}.weight"], 1e-5)

    @torch.inference_mode()
    def row(self, text: list[int], path: tuple[int, ...]) -> torch.Tensor:
        fed = self.model.model(input_ids=torch.tensor([text[:-1]])).last_hidden_state[0]
        fusing = self.weights["model.layers.2.eh_proj.weight"]
        for count in range(len(path) + 1):
            tokens = torch.tensor([*text[1:], *path[:count]])
            embedded = self.model.get_input_embeddings()(tokens)
            embedded[0] = 0
            parts = self.norm("enorm", embedded), self.norm("hnorm", fed)
            rows = (torch.cat(parts, dim=-1) @ fusing.T)[None]
            angles = self.rotary(rows, torch.arange(len(tokens))[None])
            given = self.block(rows, None, position_embeddings=angles)[0]
            fed = torch.cat([fed, given[-1:]])
        return self.model.get_output_embeddings()(self.norm("shared_head.norm", given[-1:]))[0]


@dataclass
class DraftRow:
    """One row that a head gave."""

    req_id: str
    text: list[int]  # up to the root
    path: tuple[int, ...]  # tokens from the root's child down to the node
    logits: torch.Tensor


@contextmanager
def recorded_rows():
    """A list that receives every row that heads of this process draft from within the block."""
    from vllm_spechub.proposers.heads import HeadProposer

    recorded: list[DraftRow] = []
    original = HeadProposer.level_logits

    def spy(self, step, depth, level, state, carried):
        logits, carried = original(self, step, depth, level, state, carried)
        if step.dummy_run:
            return logits, carried
        rows = logits.clone().view(step.num_reqs, len(level.nodes_np), -1)
        drafts = step.draft_rows.tolist()
        for r, req in enumerate(step.batch.idx_mapping.tolist()):
            root = int(step.root_positions[r])
            text = self.req_states.all_token_ids.gpu[req, : root + 1].tolist()
            # what is below the level is not decided yet
            grown = state.grown
            tree = state.tree if grown is None else static_tree(grown, drafts[r])
            for i, node in enumerate(level.nodes_np):
                path = tree.paths[node][1:]
                tokens = tuple(state.tokens[drafts[r], [n - 1 for n in path]].tolist())
                recorded.append(DraftRow(step.batch.req_ids[r], text, tokens, rows[r, i].float()))
        return logits, carried

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadProposer, "level_logits", spy)
        yield recorded
