# SPDX-License-Identifier: Apache-2.0
"""A pair and its prompts, ready for a study."""

from pathlib import Path

import torch
from transformers.utils import logging

from vllm_spechub.offline.simulation.study import Sampling
from vllm_spechub.offline.simulation.texts import ModelPair, read_prompts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pair(target: str, draft: str, device: str | None, dtype: str) -> ModelPair:
    """Both models on a device; None is CUDA if there is one.

    Raises:
        ValueError: an unknown dtype, or models of different vocabularies.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return ModelPair.load(target, draft, device, DTYPES[dtype])


def load(
    target: str,
    draft: str,
    prompts: Path,
    limit: int | None,
    sampling: Sampling,
    depth: int,
    device: str | None,
    dtype: str,
) -> tuple[ModelPair, list[torch.Tensor]]:
    """Both models and the prompts, cut to what leaves room for texts and trees.

    Raises:
        ValueError: as `load_pair` and `read_prompts`, or texts that are too long.
    """
    read = read_prompts(prompts, limit)
    pair = load_pair(target, draft, device, dtype)
    room = pair.max_positions - sampling.tokens - depth
    if room < 1:
        raise ValueError(
            f"--tokens {sampling.tokens} is too many: the models read {pair.max_positions}"
        )
    longest = min(room, sampling.max_prompt_tokens)
    return pair, [pair.encode(prompt, longest) for prompt in read]
