# SPDX-License-Identifier: Apache-2.0
"""Small models of other families, made from the demo pair or from a seed, in folders of their own.

transformers can run each of them, too, so its logits are the oracle for rows.
"""

import json
import shutil
from pathlib import Path

import torch
import transformers
from model_families import Family
from safetensors.torch import load_file, save_file

from helpers.pair import TARGET


def edited(folder: Path, source: str, weights=None, **changes) -> str:
    """A copy of a model with other settings, and with its weights passed through `weights`."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    if weights is not None:
        file = folder / "model.safetensors"
        save_file(weights(load_file(file)), file, {"format": "pt"})
    return str(folder)


def mistral(folder: Path, source: str, window: int) -> str:
    """The demo model with a sliding window in every layer."""
    return edited(
        folder,
        source,
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        sliding_window=window,
    )


def padded(folder: Path, source: str, vocab_size: int) -> str:
    """The demo model with more tokens than its tokenizer has, which the model does emit."""

    def lengthen(weights):
        embedding = weights["model.embed_tokens.weight"]
        twins = torch.arange(vocab_size - len(embedding)) * 4
        rows = torch.cat([embedding, (1.05 * embedding[twins]).to(embedding.dtype)])
        return weights | {"model.embed_tokens.weight": rows}

    return edited(folder, source, lengthen, vocab_size=vocab_size)


def qwen2(folder: Path, source: str) -> str:
    """The demo model in another family, which has biases, and whose heads together must be as wide
    as the hidden state: heads that output zeros make up for what is missing."""
    config = json.loads((Path(source) / "config.json").read_text())
    size, groups = config["head_dim"], config["num_key_value_heads"]
    heads = config["hidden_size"] // size
    silent = (heads - config["num_attention_heads"]) // groups

    def padded_heads(weight):
        """Add silent heads at the end of every group. [num_heads * head_size, hidden_size]"""
        by_group = weight.unflatten(0, (groups, -1))
        return torch.nn.functional.pad(by_group, (0, 0, 0, silent * size)).flatten(0, 1)

    def converted(weights):
        for name, weight in weights.items():
            if name.endswith("q_proj.weight"):
                weights[name] = padded_heads(weight)
            elif name.endswith("o_proj.weight"):
                weights[name] = padded_heads(weight.T).T.contiguous()
        biases = {
            name.replace(".weight", ".bias"): torch.zeros(len(weight), dtype=weight.dtype)
            for name, weight in weights.items()
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        }
        return weights | biases

    family = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    return edited(folder, source, converted, num_attention_heads=heads, **family)


def untied(folder: Path, source: str) -> str:
    """The demo model with a separate output matrix, which is only similar to the embedding."""

    def split(weights):
        torch.manual_seed(1)
        embedding = weights["model.embed_tokens.weight"]
        noise = 0.3 * embedding.float().std() * torch.randn(embedding.shape)
        return weights | {"lm_head.weight": (embedding + noise).to(embedding.dtype)}

    return edited(folder, source, split, tie_word_embeddings=False)


ADAPTED = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
RANK, ALPHA = 8, 16


def lora_adapter(folder: Path, source: str, seed: int) -> tuple[str, str]:
    """Make a PEFT adapter for an untied model, its output matrix included. Returns the folders of
    the adapter and of the merged model."""
    weights = load_file(Path(source) / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    tensors, merged = {}, dict(weights)
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if not module.endswith((*ADAPTED, "lm_head")):
            continue
        down = torch.randn(RANK, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        up = torch.randn(weight.shape[0], RANK, generator=generator) * weight.float().std() / 8
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
        merged[name] = weight.float() + ALPHA / RANK * up @ down
    adapter = folder / f"adapter{seed}"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    modules = [module.split(".")[-1] for module in ADAPTED] + ["lm_head"]
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": modules}
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"bias": "none"}))
    whole = edited(folder / f"merged{seed}", source, lambda _: merged, dtype="float32")
    return str(adapter), whole


def gemma3_pair(folder: Path, window: int) -> tuple[str, str]:
    """A target with sliding windows in some layers, and a noisy copy as its draft."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=4,
        max_position_embeddings=1024,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"] * 2,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = Gemma3ForCausalLM(config)
    for name, noise in (("target", 0.0), ("draft", 0.02)):
        for parameter in model.parameters():
            parameter.data += noise * torch.randn_like(parameter)
        for layer in model.model.layers:  # blocks that outweigh the embedding, for lively text
            layer.post_attention_layernorm.weight.data.fill_(2.0)
            layer.post_feedforward_layernorm.weight.data.fill_(2.0)
        model.save_pretrained(folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(TARGET) / file, folder / name)
    return str(folder / "target"), str(folder / "draft")


COMMON = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def configured(family: Family, folder: Path):
    """Write a family's tiny configuration and the demo pair's tokenizer. Returns the former."""
    config = getattr(transformers, f"{family.made_by}Config")(**COMMON | family.options)
    config.architectures = [model_class(config).__name__]
    config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TARGET) / file, folder)
    return config


def model_class(config):
    return transformers.AutoModelForCausalLM._model_mapping[type(config)]


def pair(family: Family, folder: Path) -> tuple[str, str]:
    """A tiny random model of a family, whose texts are lively, and a noisy copy as its draft."""
    torch.manual_seed(0)
    config = configured(family, folder / "target")
    model = model_class(config)(config).float()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data = 1.5 * parameter.shape[-1] ** -0.5 * torch.randn_like(parameter)
        else:
            # norms after blocks make these outweigh the embedding, whose token would win else
            parameter.data += 0.3 * torch.randn_like(parameter) + ("post_" in name)
    model.save_pretrained(folder / "target")
    configured(family, folder / "draft")
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
        parameter.data += 0.05 * scale * torch.randn_like(parameter)
    model.save_pretrained(folder / "draft")
    if family.weights != "float32":
        for name in ("target", "draft"):
            quantise(folder / name, family.weights)
    return str(folder / "target"), str(folder / "draft")


SCHEMES = {
    "w8a8": (
        "int-quantized",
        {
            "weights": {"num_bits": 8, "strategy": "channel"},
            "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
        },
    ),
    "w4a16": (
        "pack-quantized",
        {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}},
    ),
}
"""Formats of compressed-tensors, and what each quantises."""


def quantise(folder: Path, scheme: str) -> None:
    """Round the weights of a model's linear layers, and store them as compressed-tensors does."""
    layout, groups = SCHEMES[scheme]
    bits = groups["weights"]["num_bits"]
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        weight = weights.pop(name)
        by_group = weight.unflatten(1, (-1, groups["weights"].get("group_size", weight.shape[1])))
        # [num_rows, num_groups, 1]
        scale = by_group.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 1)
        rounded = (by_group / scale).round().flatten(1).to(torch.int32)
        weights[f"{name}_scale"] = scale.squeeze(2).contiguous()
        if bits == 8:
            weights[name] = rounded.to(torch.int8)
            continue
        # eight to an int32, the first lowest, with an offset
        nibbles = (rounded + 8).unflatten(1, (-1, 8)).long() << torch.arange(0, 32, 4)
        weights[f"{name}_packed"] = nibbles.sum(2).to(torch.int32)
        weights[f"{name}_shape"] = torch.tensor(weight.shape)
    save_file(weights, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for part in groups.values():
        part |= {"type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"all": {"targets": ["Linear"]} | groups},
    }
    (folder / "config.json").write_text(json.dumps(config))
