# SPDX-License-Identifier: Apache-2.0
"""What a user asks `vllm-spechub tune` for."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_spechub.drafts.sources import Sources
from vllm_spechub.measure.benchmark.machine import device_name, versions


@dataclass(frozen=True)
class TuningRequest:
    """What to tune, and how thoroughly."""

    # the models, and further arguments of `vllm.LLM`
    sources: Sources
    prompts: Path
    # number of prompts to use; None means all
    limit: int | None
    # verification rules to choose from
    rules: tuple[str, ...]
    temperature: float
    # numbers of drafted nodes, chain lengths and batch sizes to try, ascending
    nodes: tuple[int, ...]
    chains: tuple[int, ...]
    batches: tuple[int, ...]
    # number of texts per prompt on which acceptance is measured
    texts: int
    # length of each of these texts, and tokens to time per request
    tokens: int
    repetitions: int
    # how many of the draft's layers run; None for all
    draft_layers: int | None = None
    # whether to try level widths, too
    levels: bool = False

    @property
    def proposer_options(self) -> dict[str, Any]:
        """The options of SpecHub's proposer."""
        return {} if self.draft_layers is None else {"draft_layers": self.draft_layers}

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that measurements depend on."""
        prompts = hashlib.sha256(self.prompts.read_bytes()).hexdigest()[:16]
        here = {"device": device_name(), "versions": versions()}
        others = {key: value for key, value in vars(self).items() if key != "sources"}
        return vars(self.sources) | others | {"prompts": prompts} | here
