# SPDX-License-Identifier: Apache-2.0
"""The memory that trees add to an 8B and a 1B model on a GPU of 80 GB with vLLM's defaults.

Computed by the functions that size an engine's buffers. Only what vLLM's profiling finds in use is
estimated. A cog block in `docs/benchmarks.md` shows the table.
"""

from types import SimpleNamespace

import torch
from markdown_table import table

from vllm_spechub.config import DEFAULT_SCHEDULE_ON_CUDA, SpecHubConfig
from vllm_spechub.integration.memory import verification_bytes
from vllm_spechub.rules.draft_state import DraftBuffers
from vllm_spechub.trees.schedule import TreeSchedule
from vllm_spechub.triton_kernels.rules import DEFAULT_RULE

GPU_BYTES = 80e9
VOCAB_SIZE, HIDDEN_SIZE, MLP_SIZE = 128_256, 4096, 14_336  # of Llama 3.1 8B; the draft's first two
ENGINES = {"`LLM()`": (1024, 16_384), "`vllm serve`": (1024, 8192)}
"""vLLM's max_num_seqs and max_num_batched_tokens on an H100."""
SCHEDULES = {
    "the default": DEFAULT_SCHEDULE_ON_CUDA,
    '`"tree": "binary:3"`': ((1, None, "binary:3"),),
    '`"tree": "chain:3"`': ((1, None, "chain:3"),),
}


def draft_bytes(schedule: TreeSchedule, max_num_seqs: int) -> int:
    """Of the draft's rows, which are kept until they are verified."""
    most = schedule.most_requests(max_num_seqs)
    meta = torch.device("meta")
    return DraftBuffers(most, max_num_seqs, VOCAB_SIZE, torch.bfloat16, meta).num_bytes


def held_bytes(schedule: TreeSchedule, max_num_seqs: int, budget: int) -> int:
    """Of what a step holds while it verifies."""
    spec = object.__new__(SpecHubConfig)
    spec.schedule = schedule
    model = SimpleNamespace(
        dtype=torch.bfloat16,
        get_vocab_size=lambda: VOCAB_SIZE,
        get_hidden_size=lambda: HIDDEN_SIZE,
    )
    scheduler = SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    return verification_bytes(
        SimpleNamespace(scheduler_config=scheduler, model_config=model, speculative_config=spec)
    )


def forward_bytes(budget: int) -> int:
    """An estimate of what vLLM's profiling finds in use: in an MLP, the residual and the hidden
    states, both inputs of the activation, and its output."""
    return budget * (2 * HIDDEN_SIZE + 3 * MLP_SIZE) * torch.bfloat16.itemsize


def added_bytes(spec: tuple, max_num_seqs: int, budget: int) -> tuple[int, int, int]:
    """The draft's rows; what verification holds; what is kept free for it beyond a forward pass."""
    schedule = TreeSchedule.parse(spec, DEFAULT_RULE)
    held = held_bytes(schedule, max_num_seqs, budget)
    return draft_bytes(schedule, max_num_seqs), held, max(0, held - forward_bytes(budget))


def added() -> str:
    """The table."""
    rows = []
    for engine, limits in ENGINES.items():
        for name, spec in SCHEDULES.items():
            draft, held, kept = added_bytes(spec, *limits)
            share = (draft + kept) / GPU_BYTES
            rows.append(
                (engine, name, *(f"{n / 1e9:.2f} GB" for n in (draft, held, kept)), f"{share:.1%}")
            )
    header = (
        "engine",
        "trees",
        "draft rows",
        "held by verification",
        "kept free for it (estimate)",
        "added, of 80 GB",
    )
    return table(header, rows)
