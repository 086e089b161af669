# SPDX-License-Identifier: Apache-2.0
"""Load a pair of models and its prompts for a study."""

from pathlib import Path

import torch
from transformers.utils import logging

from vllm_spechub.offline.simulation.study import Sampling
from vllm_spechub.offline.simulation.texts import ModelPair, read_prompts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pair(target: str, draft: str, device: str | None, dtype: str) -> ModelPair:
    """Load both models onto a device; None stands for CUDA if available, else the CPU.

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
    """Load both models and the prompts, of which the last tokens that leave room for texts remain.

    Returns:
        The models, and the tokenised prompts, [num_prompt_tokens] int64 each.

    Raises:
        ValueError: as `load_pair` and `read_prompts` raise it, or the texts are too long.
    """
    read = read_prompts(prompts, limit)
    pair = load_pair(target, draft, device, dtype)
    room = pair.max_positions - sampling.tokens - depth
    if room < 1:
        raise ValueError(
            f"--tokens is {sampling.tokens}, allowed: less than {pair.max_positions - depth}: the "
            f"models read {pair.max_positions} positions, of which trees take {depth}"
        )
    longest = min(room, sampling.max_prompt_tokens)
    return pair, [pair.encode(prompt, longest) for prompt in read]
