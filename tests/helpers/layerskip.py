# SPDX-License-Identifier: Apache-2.0
"""Tiny random models in folders like those of LayerSkip's checkpoints, and like those that its
training recipes write.

LayerSkip's published checkpoints keep their base models' classes and formats: configurations of
transformers 4, files of a tokenizer, and weights in one file or in several with an index.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.pair import TARGET

Weights = dict[str, torch.Tensor]

COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "use_cache": True,
    "vocab_size": 2048,
}
LLAMA_3_2 = COMMON | {
    "head_dim": 32,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 1,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
}
LLAMA_2 = COMMON | {
    "max_position_embeddings": 4096,
    "num_key_value_heads": 2,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.40.2",
}
PADDED = LLAMA_3_2 | {"pad_token_id": 2048, "use_cache": False, "vocab_size": 2049}


def _one_file(weights: Weights, folder: Path) -> None:
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _several_files(stem: str, suffix: str, number: int) -> Callable[[Weights, Path], None]:
    """Stores weights in several files, with an index."""

    def store(weights: Weights, folder: Path) -> None:
        names = list(weights)
        files = [f"{stem}-{i:05}-of-{number:05}.{suffix}" for i in range(1, number + 1)]
        places = {name: files[i * number // len(names)] for i, name in enumerate(names)}
        for file in files:
            part = {name: weights[name] for name in names if places[name] == file}
            if suffix == "bin":
                torch.save(part, folder / file)
            else:
                save_file(part, folder / file, {"format": "pt"})
        total = sum(weight.nbytes for weight in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))

    return store


class Stored(NamedTuple):
    """How a checkpoint is stored."""

    config: dict[str, Any]
    # writes the weights into a folder
    weights: Callable[[Weights, Path], None]
    tokenizer_class: str = "PreTrainedTokenizerFast"
    # tokens that training added
    added: tuple[str, ...] = ()


STORED = {
    # published
    "llama3.2-1B": Stored(LLAMA_3_2, _one_file),
    "llama2-7B": Stored(LLAMA_2, _several_files("model", "safetensors", 3), "LlamaTokenizer"),
    # written by the recipes of trl, which add a token for padding, and of torchtune
    "trl": Stored(PADDED, _one_file, added=("[PAD]",)),
    "torchtune": Stored(LLAMA_2, _several_files("pytorch_model", "bin", 2), "LlamaTokenizer"),
    "torchtune, older": Stored(
        LLAMA_2, lambda weights, folder: torch.save(weights, folder / "hf_model_0001_0.pt")
    ),
}


def store(name: str, folder: Path) -> str:
    """Make a folder like one of `STORED`. Returns it."""
    how = STORED[name]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(how.config))
    generation = {"bos_token_id": 0, "do_sample": True, "eos_token_id": 0, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(generation | {"top_p": 0.9}))
    tokenizer = json.loads((Path(TARGET) / "tokenizer.json").read_text())
    for i, content in enumerate(how.added, how.config["vocab_size"] - len(how.added)):
        first = dict(tokenizer["added_tokens"][0])
        tokenizer["added_tokens"].append(first | {"id": i, "content": content})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    special |= dict.fromkeys(("pad_token",) if how.added else (), *how.added)
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = special | {"tokenizer_class": how.tokenizer_class, "model_max_length": 131072}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**how.config))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = 1.5 * parameter.shape[-1] ** -0.5 * torch.randn_like(parameter)
    dtype = getattr(torch, how.config["torch_dtype"])
    weights = {name: weight.to(dtype) for name, weight in model.state_dict().items()}
    if how.config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    how.weights(weights, folder)
    return str(folder)
