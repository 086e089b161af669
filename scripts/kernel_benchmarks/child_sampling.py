# SPDX-License-Identifier: Apache-2.0
"""Child sampling: the children of one level's nodes, drawn from the draft's rows.

The level is the tree's deepest one that has children, the widest. Bytes: each draft row, once.
Error: the share of rows whose children differ from the reference's.
vLLM: `gumbel_sample`, which draws one token from each of the same rows.
"""

from typing import Any

import torch

from kernel_benchmarks.measure import Case, Plot, grid, tree_for
from kernel_benchmarks.sampling import DTYPES, Requests, draft_rows
from vllm_spechub.rules.draft_state import DraftBuffers
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels.child_sampling import reference
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES, DEFAULT_RULE

SETTINGS = grid(
    rule=tuple(BUILTIN_RULES),
    nodes=(7, 14, 30, 62),
    vocab=(32_000, 128_256, 151_936),
    dtype=("bf16", "fp32"),
    temperature=(0.0, 1.0),
    batch=(1, 4, 16, 64, 256),
)
QUICK = grid(
    rule=tuple(BUILTIN_RULES),
    nodes=(14,),
    vocab=(32_000,),
    dtype=("fp32",),
    temperature=(0.0, 1.0),
    batch=(1, 4),
)
PLOT = Plot(
    "batch", "nodes", {"rule": DEFAULT_RULE, "vocab": 128_256, "dtype": "bf16", "temperature": 1.0}
)


def prepare(
    setting: dict[str, Any], device: torch.device, tree: TokenTree | None = None, depth: int = -1
) -> Case:
    """By default, the tree is the setting's number of nodes, and the level its deepest."""
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    from vllm_spechub.integration.select import platform

    batch, vocab, dtype = setting["batch"], setting["vocab"], DTYPES[setting["dtype"]]
    tree = tree or tree_for(setting["rule"], setting["nodes"])
    requests = Requests(batch, vocab, tree, setting["temperature"], 1.0, device)
    level = DraftBuffers([tree], batch, 1, dtype, device).states[0].levels[depth]
    rows = level.rows(batch)
    logits = draft_rows((len(rows.nodes), vocab), dtype, device)
    of_rows = requests.drafting.rows(rows.req)

    def sample(sample_rows=platform().tree_kernels().sample_children):
        return sample_rows(
            logits,
            rows.nodes,
            rows.num_children,
            of_rows,
            rule=setting["rule"],
            max_children=level.max_children,
        )

    found, expected = sample(), sample(reference.sample_children)
    wrong = (found.tokens != expected.tokens).any(dim=1) | (found.sampled != expected.sampled)
    return Case(
        run=sample,
        num_bytes=logits.nbytes,
        error=float(wrong.float().mean()),
        # Two tokens whose noisy logits round to one number, about once in 10^6 rows.
        tolerance=max(0.01, 1 / len(logits)),
        others={
            "vllm": lambda: gumbel_sample(
                logits,
                of_rows.req_idx,
                of_rows.temperature,
                of_rows.seeds,
                of_rows.root_positions,
                apply_temperature=True,
                is_drafting=True,
            )
        },
        found={"rows": len(logits)},
    )
