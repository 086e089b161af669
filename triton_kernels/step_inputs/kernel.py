# SPDX-License-Identifier: Apache-2.0
"""The inputs of a step in Triton."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from . import DraftInputs, Layout, Verified

BLOCK = 256
"""Tokens of a program."""


@triton.jit(do_not_specialize=["num_tokens"])
def _lay_out_kernel(
    # [num_tokens] each, written
    positions_ptr,
    visible_until_ptr,
    tree_mask_ptr,
    # [num_tokens]
    slots_ptr,
    # [num_tokens]
    entries_ptr,
    # [num_entries] each
    position_offsets_ptr,
    until_offsets_ptr,
    masks_ptr,
    num_tokens,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of tokens,)."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = token < num_tokens
    entry = tl.load(entries_ptr + token, mask=known, other=0)
    slot = tl.load(slots_ptr + token, mask=known, other=0)
    position = slot + tl.load(position_offsets_ptr + entry)
    until = slot + tl.load(until_offsets_ptr + entry)
    tl.store(positions_ptr + token, position, mask=known)
    tl.store(visible_until_ptr + token, until.to(tl.int32), mask=known)
    tl.store(tree_mask_ptr + token, tl.load(masks_ptr + entry), mask=known)


@triton.jit(
    do_not_specialize=["most_reqs", "num_reqs", "rows_per_req", "path_stride", "path_width"]
)
def _prepare_drafts_kernel(
    # [most_reqs] each, written
    idx_mapping_ptr,
    draft_rows_ptr,
    first_positions_ptr,
    root_positions_ptr,
    # [most_reqs, rows_per_req], written
    sources_ptr,
    # [num_draft_rows] each, written
    row_temperature_ptr,
    row_seeds_ptr,
    # [3, most_reqs]
    requests_ptr,
    # [num_tokens]
    positions_ptr,
    # [num_reqs + 1]
    query_start_loc_ptr,
    # [num_reqs]
    num_rejected_ptr,
    # [num_reqs, path_width], not read if the width is 0
    paths_ptr,
    # [max_num_reqs]
    temperature_ptr,
    # [max_num_reqs]
    seeds_ptr,
    most_reqs,
    num_reqs,
    rows_per_req,
    path_stride,
    path_width,
    # at least rows_per_req
    ROWS: tl.constexpr,
):
    """Grid: (most_reqs,)."""
    place = tl.program_id(0)
    req = tl.load(requests_ptr + place)
    draft_row = tl.load(requests_ptr + most_reqs + place)
    skipped = tl.load(requests_ptr + 2 * most_reqs + place)
    tl.store(idx_mapping_ptr + place, req)
    tl.store(draft_rows_ptr + place, draft_row)
    real = place < num_reqs
    begin = tl.load(query_start_loc_ptr + place, mask=real, other=0)
    end = tl.load(query_start_loc_ptr + place + 1, mask=real, other=0)
    rejected = tl.load(num_rejected_ptr + place, mask=real, other=0)
    first = tl.load(positions_ptr + begin, mask=real, other=0)
    tl.store(first_positions_ptr + place, first + skipped)
    tl.store(root_positions_ptr + place, first + end - begin - rejected)
    row = tl.arange(0, ROWS)
    depth = tl.minimum(row, path_width - 1)
    on_path = real & (path_width > 0)
    node = tl.load(paths_ptr + place * path_stride + depth, mask=(row >= 0) & on_path, other=0)
    source = (begin + tl.maximum(node, 0)).to(tl.int64)
    tl.store(sources_ptr + place * rows_per_req + row, source, mask=row < rows_per_req)
    # Padding requests share a row, which has to be greedy.
    owned = real & (req >= 0)
    temperature = tl.load(temperature_ptr + req, mask=owned, other=0.0)
    tl.store(row_temperature_ptr + draft_row, temperature)
    tl.store(row_seeds_ptr + draft_row, tl.load(seeds_ptr + req, mask=owned, other=0))


def lay_out(
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
    """`step_inputs.lay_out` on the GPU."""
    num_tokens = len(slots)
    _lay_out_kernel[(triton.cdiv(num_tokens, BLOCK),)](
        *layout,
        slots,
        entries,
        position_offsets,
        until_offsets,
        masks,
        num_tokens,
        BLOCK=BLOCK,
    )


def prepare_drafts(
    inputs: "DraftInputs",
    # [3, most_reqs] int64
    requests: torch.Tensor,
    verified: "Verified",
    rows_per_req: int,
) -> None:
    """`step_inputs.prepare_drafts` on the GPU."""
    most_reqs, paths = requests.shape[1], verified.paths
    _prepare_drafts_kernel[(most_reqs,)](
        *inputs,
        requests,
        verified.positions,
        verified.query_start_loc,
        verified.num_rejected,
        verified.num_rejected if paths is None else paths,
        verified.temperature,
        verified.seeds,
        most_reqs,
        len(verified.num_rejected),
        rows_per_req,
        0 if paths is None else paths.stride(0),
        0 if paths is None else paths.shape[1],
        ROWS=triton.next_power_of_2(rows_per_req),
        num_warps=1,
    )
