# SPDX-License-Identifier: Apache-2.0
"""The models and settings of a study that `vllm-spechub simulate --out FOLDER` made."""

import json
from pathlib import Path

import torch

from vllm_spechub.drafts.sources import Sources
from vllm_spechub.offline.simulation.load import load
from vllm_spechub.offline.simulation.report import STUDY_JSON
from vllm_spechub.offline.simulation.study import Sampling
from vllm_spechub.offline.simulation.texts import ModelPair


def load_study(
    folder: Path, prompts: Path, limit: int | None, texts: int, depth: int | None = None
) -> tuple[ModelPair, list[torch.Tensor], Sampling]:
    """Load a study's pair in fp32 on one thread, and its prompts.

    Args:
        folder: the study's.
        prompts: a file of prompts.
        limit: how many of them to use; None means all.
        texts: for each prompt.
        depth: of the deepest tree, by default the study's.
    """
    settings = json.loads((folder / STUDY_JSON).read_text(encoding="utf-8"))["settings"]
    sampling = Sampling(
        texts=texts,
        tokens=settings["tokens"],
        roots=settings["roots_per_text"],
        seed=settings["seed"],
    )
    torch.set_num_threads(1)
    sources = Sources(settings["target"], settings["draft"])
    deepest = max(settings["depth"]) if depth is None else depth
    pair, encoded = load(sources, prompts, limit, sampling, deepest, None, "float32")
    return pair, encoded, sampling
