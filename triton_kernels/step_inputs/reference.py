# SPDX-License-Identifier: Apache-2.0
"""The inputs of a step in plain PyTorch: what the kernels are tested against, and the CPU path."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from . import DraftInputs, Layout, Verified


def lay_out_reference(
    layout: "Layout",
    # [num_tokens] int64
    slots: torch.Tensor,
    # [num_tokens] int32
    entries: torch.Tensor,
    # [num_entries] int64 each
    position_offsets: torch.Tensor,
    until_offsets: torch.Tensor,
    masks: torch.Tensor,
) -> None:
    """`lay_out` in PyTorch."""
    positions, visible_until, tree_mask = (buffer[: len(slots)] for buffer in layout)
    torch.add(slots, position_offsets[entries], out=positions)
    torch.add(slots, until_offsets[entries], out=visible_until)
    torch.index_select(masks, 0, entries, out=tree_mask)


def prepare_drafts_reference(
    inputs: "DraftInputs",
    # [3, most_reqs] int64
    requests: torch.Tensor,
    verified: "Verified",
    rows_per_req: int,
) -> None:
    """`prepare_drafts` in PyTorch."""
    most_reqs, num_reqs = requests.shape[1], len(verified.num_rejected)
    device = requests.device
    req, draft_rows, skipped = requests
    inputs.idx_mapping[:most_reqs] = req
    inputs.draft_rows[:most_reqs] = draft_rows
    begin, end = verified.query_start_loc[:num_reqs], verified.query_start_loc[1 : num_reqs + 1]
    first = torch.zeros(most_reqs, dtype=torch.int64, device=device)
    root = torch.zeros(most_reqs, dtype=torch.int64, device=device)
    first[:num_reqs] = verified.positions[begin]
    root[:num_reqs] = first[:num_reqs] + end - begin - verified.num_rejected
    inputs.first_positions[:most_reqs] = first + skipped
    inputs.root_positions[:most_reqs] = root
    # [num_reqs, rows_per_req], a tree's nodes stand in the batch after its root
    nodes = torch.zeros(most_reqs, rows_per_req, dtype=torch.int64, device=device)
    if verified.paths is not None:
        width = verified.paths.shape[1]
        depths = torch.arange(rows_per_req, device=device).clamp(max=width - 1)
        nodes[:num_reqs] = verified.paths[:, depths].clamp(min=0)
    nodes[:num_reqs] += begin.unsqueeze(1)
    inputs.sources[: most_reqs * rows_per_req] = nodes.flatten()
    real = req >= 0
    inputs.temperature[draft_rows] = torch.where(real, verified.temperature[req], 0.0)
    inputs.seeds[draft_rows] = torch.where(real, verified.seeds[req], 0)
