# SPDX-License-Identifier: Apache-2.0
"""What a draft is: a model that runs by itself, or a head on its target's hidden states.

vLLM tells some of them by words in the draft's path; here the configuration and the names of the
weights count.
"""

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig
from vllm.config import ModelConfig, SpeculativeConfig
from vllm.model_executor.models.registry import _SPECULATIVE_DECODING_MODELS
from vllm.transformers_utils.config import get_config

MODEL = "draft_model"
"""The proposer for models that run by themselves."""
EARLY_EXIT = "early_exit"
"""The proposer for the target's own first layers."""
EAGLE, EAGLE3, MTP = "eagle", "eagle3", "mtp"
"""The proposers for heads, which are named as vLLM's methods are."""
FUSING_LAYERS = frozenset({"fc.weight", "model.fc.weight"})
"""What joins a hidden state with a token in EAGLE's heads and those made after it. The first ones
call themselves an ordinary model in their configuration."""

# The first word that is in the name of an architecture tells the kind.
_WORDS = {
    "PEagle": "P-EAGLE",
    "Peagle": "P-EAGLE",
    "DFlash": "DFlash",
    "LiLiCorr": "DFlash",
    "MuseGlimmer": "DFlash",
    "DSpark": "DSpark",
    "Eagle3": EAGLE3,
    "Eagle": EAGLE,
    "MTP": MTP,
    "Medusa": "Medusa",
    "MLPSpeculator": "MLP speculator",
}
_MODEL_TYPES = {"medusa": "Medusa", "mlp_speculator": "MLP speculator"}


class Head(NamedTuple):
    """A draft that is not a model by itself."""

    # the proposer's name, or the kind's own where no proposer drafts with it
    kind: str
    # what shows it
    sign: str
    # how many MTP layers it has
    layers: int = 0


def head_of(config: PretrainedConfig, tensor_names: Iterable[str]) -> Head | None:
    """What kind of head a draft is; None for a model that runs by itself.

    Args:
        config: the draft's configuration as vLLM reads it for a draft.
        tensor_names: of its weights, as far as they are known.
    """
    model_type = config.model_type
    if model_type in _MODEL_TYPES:
        return Head(
            _MODEL_TYPES[model_type], f"vLLM reads its configuration as model_type={model_type!r}"
        )
    for architecture in config.architectures or ():
        if architecture in _SPECULATIVE_DECODING_MODELS:
            kinds = (kind for word, kind in _WORDS.items() if word in architecture)
            sign = f"vLLM reads its configuration as {architecture}"
            return Head(next(kinds, architecture), sign, getattr(config, "n_predict", None) or 0)
    names = set(tensor_names)
    for name in FUSING_LAYERS & names:
        third = any("hidden_norm" in other for other in names)
        return Head(EAGLE3 if third else EAGLE, f"its weights have the layer {name!r}")
    return None


def named_head(options: Mapping[str, Any], target: ModelConfig) -> Head | None:
    """What kind of head a user's options name; None for a model that runs by itself, and for what
    cannot be read.

    Args:
        options: of `--speculative-config`. Without a `model`, it is what the target itself brings.
        target: the target's configuration.
    """
    if options.get("model") is None:
        if not target.hf_config.architectures:
            return None
        head = head_of(SpeculativeConfig.hf_config_override(deepcopy(target.hf_config)), ())
        return head if head is not None and head.kind == MTP and head.layers else None
    if not isinstance(options["model"], str):
        return None  # whoever checks the option refuses it; a hub would be asked for minutes
    return read_head(
        options["model"],
        options.get("revision"),
        trust_remote_code=target.trust_remote_code,
        code_revision=options.get("code_revision"),
        config_format=target.config_format,
    )


def read_head(draft: str, revision: str | None = None, **options: Any) -> Head | None:
    """What kind of head is in a folder or has a Hugging Face id; None for a model that runs by
    itself, and for what cannot be read.

    Args:
        draft: the folder or id.
        revision: of the id.
        options: further arguments of vLLM's `get_config`.
    """
    options = {"trust_remote_code": False} | options
    try:
        config = get_config(draft, revision=revision, **options)
        config = SpeculativeConfig.hf_config_override(config)
    except Exception:  # whatever it is, vLLM will meet it too, and say so
        return _unknown_head(draft, revision)
    return head_of(config, tensor_names(draft, revision))


def _unknown_head(draft: str, revision: str | None) -> Head | None:
    """A head whose configuration vLLM cannot read: from 0.33 on, Medusa's and MLP speculators'."""
    try:
        raw, _ = PretrainedConfig.get_config_dict(draft, revision=revision)
        model_type = raw.get("model_type")
    except Exception:
        return None
    if model_type in _MODEL_TYPES:
        return Head(_MODEL_TYPES[model_type], f"its configuration has {model_type=}")
    if "medusa_num_heads" in raw:  # as published first, without a type
        return Head("Medusa", "its configuration has medusa_num_heads")
    return None


def proposer_for(options: Mapping[str, Any], target: ModelConfig) -> str:
    """The name of the proposer for the draft that a user's options name.

    Raises:
        ValueError: one line: no proposer drafts with a head of this kind.
    """
    head = named_head(options, target)
    if head is None:
        return MODEL
    if options.get("model") is not None:  # otherwise it is the target's own MTP layer
        check_kind("speculative_config['model']:", options["model"], head)
    return head.kind


def check_kind(option: str, draft: str, head: Head) -> None:
    """Check that there is a proposer for a head.

    Args:
        option: what named the head, for messages.
        draft: its folder or Hugging Face id.
        head: what kind it is.

    Raises:
        ValueError: one line.
    """
    if head.kind not in (EAGLE, EAGLE3, MTP):
        raise ValueError(
            f"{option} {draft!r} is a {head.kind} head ({head.sign}), which cannot draft trees; "
            "use an EAGLE-3, EAGLE or MTP head, or a model that runs by itself"
        )


def tensor_names(draft: str, revision: str | None) -> Iterator[str]:
    """The names of a draft's weights, as far as their files are here already and can be read."""
    folder = Path(draft)
    if not folder.is_dir():
        # vLLM has just read it
        config = try_to_load_from_cache(draft, "config.json", revision=revision)
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
