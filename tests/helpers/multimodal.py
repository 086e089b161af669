# SPDX-License-Identifier: Apache-2.0
"""Tiny multimodal targets: the demo target with a vision tower of random weights, and images.

Their texts are as lively as the demo target's, and the demo draft, which knows no images, fits.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from helpers import models
from helpers.pair import PROMPTS, TARGET
from helpers.without_torchvision import let_models_be_imported

PATCH, MERGE = 14, 2
ROWS = 2112
"""Of the embedding: the demo pair's 2048 tokens, those for images, and padding."""


def image(seed: int, width: int = 4, height: int = 4) -> Image.Image:
    """Noise, of a size in patches."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height * PATCH, width * PATCH, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def _tokenizer(folder: Path, *added: str) -> PreTrainedTokenizerFast:
    """The demo pair's, with tokens for images."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TARGET)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in added])
    tokenizer.save_pretrained(folder)
    return tokenizer


def _save(model, language: dict[str, torch.Tensor], features, folder: Path) -> None:
    """Give a model random vision weights and a language model's weights, and store it.

    Args:
        language: the language model's weights, by their names in it.
        features: computes what the vision tower hands to the language model for an image.
    """
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = 1.5 * parameter[0].numel() ** -0.5 * torch.randn_like(parameter)
    embedding = language["embed_tokens.weight"]
    padding = 0.3 * embedding.float().std() * torch.randn(ROWS - len(embedding), embedding.shape[1])
    language["embed_tokens.weight"] = torch.cat([embedding.float(), padding])
    model.model.language_model.load_state_dict({n: w.float() for n, w in language.items()})
    model.lm_head.weight.data = model.model.language_model.embed_tokens.weight.data
    # like words, and as strong
    scale = embedding.float().std() / features(model).std()
    last = _last_linear(model)
    last.weight.data *= scale
    last.bias.data *= scale
    model.save_pretrained(folder)


def _last_linear(model) -> torch.nn.Linear:
    if hasattr(model.model, "multi_modal_projector"):
        return model.model.multi_modal_projector.linear_2
    return model.model.visual.merger.mlp[-1]


def _weights(folder: str) -> dict[str, torch.Tensor]:
    weights = load_file(Path(folder) / "model.safetensors")
    return {name.removeprefix("model."): weight for name, weight in weights.items()}


@torch.no_grad()
def llava(folder: Path) -> str:
    """A LLaVA around the demo target; `<image>` becomes 16 tokens."""
    torch.manual_seed(0)
    text = LlamaConfig.from_pretrained(TARGET, vocab_size=ROWS)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=4 * PATCH,
        patch_size=PATCH,
        projection_dim=32,
    )
    tokenizer = _tokenizer(folder, "<image>")
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        tie_word_embeddings=True,
    )
    size = {"height": 4 * PATCH, "width": 4 * PATCH}
    images = CLIPImageProcessorPil(size=size, crop_size=size)
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    model = LlavaForConditionalGeneration(config).float()
    pixels = images(image(0), return_tensors="pt")["pixel_values"]

    def features(model):
        return torch.cat(list(model.get_image_features(pixels).pooler_output))

    _save(model, _weights(TARGET), features, folder)
    file = folder / "model.safetensors"
    # as in published checkpoints, which vLLM reads
    names = {name: name.replace("tower.", "tower.vision_model.") for name in load_file(file)}
    save_file({names[n]: w for n, w in load_file(file).items()}, file, {"format": "pt"})
    return str(folder)


QWEN = {
    "qwen2_vl": (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        lambda size: {"embed_dim": 32, "hidden_size": size, "mlp_ratio": 2},
    ),
    # windows of two by two patches after merging in the first of two layers
    "qwen2_5_vl": (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        lambda size: {
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": size,
            "fullatt_block_indexes": [1],
            "window_size": 2 * PATCH * MERGE,
        },
    ),
}
"""Of each version of Qwen-VL: its configuration, its model, and its vision tower's options by the
size of hidden states."""


@torch.no_grad()
def qwen_vl(kind: str, folder: Path, source: Path) -> str:
    """A Qwen-VL around the demo target as Qwen 2, which is made in `source`."""
    configuration, model_class, vision = QWEN[kind]
    torch.manual_seed(0)
    qwen2 = models.qwen2(source, TARGET)
    shape = json.loads((Path(qwen2) / "config.json").read_text())
    names = ("start", "end")
    added = [*(f"<|vision_{name}|>" for name in names), "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _tokenizer(folder, *added)
    start, end, image_token, video_token = map(tokenizer.convert_tokens_to_ids, added)
    config = configuration(
        text_config={
            "vocab_size": ROWS,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": shape["rope_parameters"]["rope_theta"],
                "mrope_section": [4, 6, 6],
            },
            **{
                name: shape[name]
                for name in (
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "num_key_value_heads",
                    "max_position_embeddings",
                    "rms_norm_eps",
                    "bos_token_id",
                    "eos_token_id",
                )
            },
        },
        vision_config={"depth": 2, "num_heads": 2, **vision(shape["hidden_size"])},
        image_token_id=image_token,
        video_token_id=video_token,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=True,
    )
    side = PATCH * MERGE
    images = Qwen2VLImageProcessorPil(min_pixels=side * side, max_pixels=36 * side * side)
    images.save_pretrained(folder)
    model = model_class(config).float()
    inputs = images([image(0)], return_tensors="pt")

    def features(model):
        found = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        return torch.cat(list(found.pooler_output))

    _save(model, _weights(qwen2), features, folder)
    shutil.rmtree(source)
    return str(folder)


SIZES = {0: [(4, 4)], 1: [(8, 4), (4, 12)], 4: [(12, 8)]}
"""Of each prompt's images, in patches, by the prompt's place among PROMPTS."""


@dataclass(frozen=True)
class Target:
    """A multimodal target, with how images are written in its prompts."""

    folder: str
    has_mrope: bool
    # what stands for an image in a prompt
    mark: str

    @property
    def options(self) -> dict[str, Any]:
        """Of an engine with this target: no videos, whose processing needs torchvision."""
        return {"model": self.folder} | (
            {"limit_mm_per_prompt": {"video": 0}} if self.has_mrope else {}
        )

    def prompts(self) -> list:
        """Some of PROMPTS after images, and others as they are."""
        prompts = []
        for i, text in enumerate(PROMPTS):
            if i not in SIZES:
                prompts.append(text)
                continue
            images = [image(10 * i + n, *size) for n, size in enumerate(SIZES[i])]
            before = f"x = 1\n{self.mark}" if i == 4 else self.mark * len(images)
            prompts.append({"prompt": before + text, "multi_modal_data": {"image": images}})
        return prompts

    def delta(self, i: int) -> int:
        """By how much the M-RoPE position of a token of a prompt's text exceeds its slot."""
        if not self.has_mrope:
            return 0
        sizes = [(w // MERGE, h // MERGE) for w, h in SIZES.get(i, [])]
        return sum(max(size) - size[0] * size[1] for size in sizes)


def target(kind: str, folder: Path) -> Target:
    """Make one of the targets in a folder."""
    if kind == "llava":
        return Target(llava(folder), False, "<image>")
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    return Target(qwen_vl(kind, folder, folder / "qwen2"), True, mark)


@contextmanager
def importable() -> Iterator[None]:
    """Within, vLLM has its multimodal models, and asks their classes here what they support: it
    would start a process, which imports everything anew."""
    let_models_be_imported()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.model_executor.models.registry._run_in_subprocess", lambda ask: ask())
        yield
