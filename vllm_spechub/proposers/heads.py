# SPDX-License-Identifier: Apache-2.0
"""Tells heads, which draft from their target's hidden states, from models that run by themselves.

vLLM tells some of them by words in the draft's path; here the configuration and the names of the
weights count.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from vllm.config import ModelConfig
from vllm.config.speculative import SpeculativeMethod
from vllm.model_executor.models.registry import _SPECULATIVE_DECODING_MODELS

FUSING_LAYERS = frozenset({"fc.weight", "model.fc.weight"})
"""What joins a hidden state with a token in EAGLE's heads and those made after it. The first ones
call themselves an ordinary model in their configuration."""


def sign_of_a_head(draft: ModelConfig) -> str | None:
    """What shows that a draft is a head; None for a model that runs by itself."""
    model_type = draft.hf_config.model_type
    if model_type in get_args(SpeculativeMethod):
        return f"vLLM reads its configuration as model_type={model_type!r}"
    for architecture in draft.architectures:
        if architecture in _SPECULATIVE_DECODING_MODELS:
            return f"vLLM reads its configuration as {architecture}"
    for name in _tensor_names(draft):
        if name in FUSING_LAYERS:
            return f"its weights have the layer {name!r}"
    return None


def _tensor_names(draft: ModelConfig) -> Iterator[str]:
    """The names of a draft's weights, as far as their files are here already and can be read."""
    folder = Path(draft.model)
    if not folder.is_dir():
        # vLLM has just read it
        config = try_to_load_from_cache(draft.model, "config.json", revision=draft.revision)
        if not isinstance(config, str):
            return
        folder = Path(config).parent
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt") as weights:
                yield from weights.keys()
        except (SafetensorError, OSError):
            continue
    for file in folder.glob("pytorch_model*.bin"):
        try:
            yield from torch.load(file, map_location="meta", mmap=True, weights_only=True)
        except Exception:  # any kind of pickle
            continue
