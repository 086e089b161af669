# SPDX-License-Identifier: Apache-2.0
"""Verification: from the target's logits to accepted tokens, sampling parameters included.

Bytes: each row that the result depends on, once. Those are the target's rows of nodes that have
children and some chance to be accepted, above temperature 0 the draft's rows of the same nodes, and
the target's row of the leaf where a path ends. What top-p reads and writes is not counted: it is
work, not a floor.
Error: the share of requests whose tokens or path differ from the reference's.
vLLM: its own rejection sampler, `apply_sampling_params` and `rejection_sample` in chunks, for a
chain of as many drafted tokens. It has no host version.
"""

from typing import Any

import torch

from kernel_benchmarks.measure import Case, Plot, grid, tree_for
from kernel_benchmarks.sampling import DTYPES, Requests, disturb
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels.arguments import TargetRows
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES, DEFAULT_RULE
from vllm_spechub.triton_kernels.verification import reference

SETTINGS = grid(
    rule=tuple(BUILTIN_RULES),
    nodes=(7, 14, 30, 62),
    vocab=(32_000, 128_256, 151_936),
    dtype=("bf16", "fp32"),
    temperature=(0.0, 1.0),
    top_p=(1.0, 0.9),
    batch=(1, 4, 16, 64, 256),
)
QUICK = grid(
    rule=tuple(BUILTIN_RULES),
    nodes=(14,),
    vocab=(32_000,),
    dtype=("fp32",),
    temperature=(0.0, 1.0),
    top_p=(1.0,),
    batch=(1, 4),
)
PLOT = Plot(
    "batch",
    "nodes",
    {"rule": DEFAULT_RULE, "vocab": 128_256, "dtype": "bf16", "temperature": 1.0, "top_p": 1.0},
)


def prepare(setting: dict[str, Any], device: torch.device, tree: TokenTree | None = None) -> Case:
    """By default, the tree is the setting's number of nodes."""
    from vllm_spechub.integration.select import platform

    dtype, rule = DTYPES[setting["dtype"]], setting["rule"]
    tree = tree or tree_for(rule, setting["nodes"])
    requests = Requests(
        setting["batch"], setting["vocab"], tree, setting["temperature"], setting["top_p"], device
    )
    batch = requests.batch
    draft = requests.draft(dtype, rule)
    logits = requests.target_rows(draft, dtype)
    tokens = torch.cat([draft.tokens.new_zeros(batch.num_reqs, 1), draft.tokens], dim=1).flatten()
    num_nodes = torch.full_like(requests.row_start, tree.num_nodes)

    def target() -> TargetRows:
        rows, temperature = requests.tree_sampler.process(logits, batch)
        return TargetRows(rows, temperature, requests.row_start, num_nodes, tokens)

    drafted = draft.drafts, requests.drafting, draft.tables

    def verify(verify_rows=platform().tree_kernels().verify_tree):
        return verify_rows(target(), *drafted, level_sizes=tree.level_sizes, rule=rule)

    expected, found = verify(reference.verify_tree), verify()
    wrong = torch.zeros(batch.num_reqs, dtype=torch.bool, device=device)
    for one, other in zip(found, expected, strict=True):
        wrong |= (one != other).view(batch.num_reqs, -1).any(dim=1)
    inner = draft.tables.num_children > 0
    num_inner = int((reference.reach(target(), *drafted, rule=rule)[:, inner] > 0).sum())
    last = expected.path.max(dim=1).values.long()
    num_rows = num_inner * (2 if setting["temperature"] else 1) + int((~inner[last]).sum())
    return Case(
        run=verify,
        num_bytes=num_rows * setting["vocab"] * dtype.itemsize,
        error=float(wrong.float().mean()),
        # A draw that falls within rounding of its threshold, about once in 10^5.
        tolerance=max(0.01, 1 / batch.num_reqs),
        others={"vllm": _chain(requests, logits) if device.type == "cuda" else None},
        found={"tokens_per_step": round(float(found.num_emitted.float().mean()), 2)},
    )


def _chain(requests: Requests, logits: torch.Tensor):
    """A function that runs vLLM's verification of as many tokens, drawn from similar rows."""
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
    from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import (
        RejectionSampler,
        get_max_chunk_logits,
    )

    batch, num_steps = requests.batch, requests.tree.num_nodes
    # [batch, num_steps, vocab]
    rows = logits.unflatten(0, (batch.num_reqs, 1 + num_steps))[:, :num_steps]
    draft_logits = disturb(rows.contiguous())
    tokens = torch.zeros(batch.num_reqs, 1 + num_steps, dtype=torch.int32, device=logits.device)
    for step in range(num_steps):
        tokens[:, 1 + step] = gumbel_sample(
            draft_logits[:, step],
            batch.idx_mapping,
            requests.temperature,
            requests.seeds,
            requests.root_positions + step,
            apply_temperature=True,
            is_drafting=True,
        )
    tokens = tokens.flatten()
    sampler = RejectionSampler(requests.sampler, requests.config, logits.device)
    limit = get_max_chunk_logits(requests.vocab)
    return lambda: sampler._verify_in_chunks(
        logits, batch, draft_logits, tokens, batch.positions, limit, NO_LOGPROBS
    )
