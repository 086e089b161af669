# SPDX-License-Identifier: Apache-2.0
"""A pair and its prompts, ready for a study; all is checked before weights are loaded."""

from pathlib import Path

import torch
from transformers.utils import logging

from vllm_spechub.offline.simulation.study import Sampling
from vllm_spechub.offline.simulation.texts import ModelPair, PairDescription, read_prompts
from vllm_spechub.vocabulary import first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def placement(device: str | None, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Where models are loaded, and as what; the device None is CUDA if there is one.

    Raises:
        ValueError: an unknown dtype, or a device that is not there.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = first_line(error).partition(". ")[0]
        raise ValueError(f"--device {name!r} cannot be used: {reason}") from error
    return torch.device(name), DTYPES[dtype]


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
        ValueError: as `placement`, `read_prompts` and `PairDescription.read`, or texts that are too
            long.
    """
    where = placement(device, dtype)
    read = read_prompts(prompts, limit)
    description = PairDescription.read(target, draft)
    room = description.max_positions - sampling.tokens - depth
    if room < 1:
        raise ValueError(
            f"--tokens {sampling.tokens} is too many: the models read {description.max_positions}"
        )
    longest = min(room, sampling.max_prompt_tokens)
    logging.disable_progress_bar()
    pair = description.load(*where)
    return pair, [pair.encode(prompt, longest) for prompt in read]
