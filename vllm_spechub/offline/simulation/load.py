# SPDX-License-Identifier: Apache-2.0
"""Load a pair of models and its prompts for a study, after checks that need no weights."""

from pathlib import Path

import torch
from transformers.utils import logging

from vllm_spechub.drafts.sources import Sources
from vllm_spechub.drafts.vocabulary import first_line
from vllm_spechub.offline.simulation.study import Sampling
from vllm_spechub.offline.simulation.texts import ModelPair, PairDescription, read_prompts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def placement(device: str | None, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Where models are loaded, and as what; None stands for CUDA if available, else the CPU.

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
    sources: Sources,
    prompts: Path,
    limit: int | None,
    sampling: Sampling,
    depth: int,
    device: str | None,
    dtype: str,
    draft_layers: int | None = None,
) -> tuple[ModelPair, list[torch.Tensor]]:
    """Load both models and the prompts, of which the last tokens that leave room for texts remain.

    Returns:
        The models, and the tokenised prompts, [num_prompt_tokens] int64 each.

    Raises:
        ValueError: as `placement`, `read_prompts` and `PairDescription.read` raise it, or the texts
            are too long.
    """
    where = placement(device, dtype)
    read = read_prompts(prompts, limit)
    description = PairDescription.read(sources, draft_layers=draft_layers)
    room = description.max_positions - sampling.tokens - depth
    if room < 1:
        raise ValueError(
            f"--tokens is {sampling.tokens}, allowed: less than "
            f"{description.max_positions - depth}, as the models read {description.max_positions} "
            f"positions and a tree takes {depth}"
        )
    longest = min(room, sampling.max_prompt_tokens)
    logging.disable_progress_bar()
    pair = description.load(*where)
    return pair, [pair.encode(prompt, longest) for prompt in read]
