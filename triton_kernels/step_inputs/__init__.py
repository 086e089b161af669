# SPDX-License-Identifier: Apache-2.0
"""What a step reads, put into buffers that CUDA graphs replay: one launch each for what would
otherwise be a dozen small operations."""

from typing import NamedTuple

import torch

from .reference import lay_out_reference, prepare_drafts_reference

__all__ = [
    "DraftInputs",
    "Layout",
    "Verified",
    "lay_out",
    "lay_out_reference",
    "prepare_drafts",
    "prepare_drafts_reference",
]


class Layout(NamedTuple):
    """Where tokens stand and what they see."""

    # [max_num_tokens] int64, RoPE positions
    positions: torch.Tensor
    # [max_num_tokens] int32, see `tree_attention`
    visible_until: torch.Tensor
    # [max_num_tokens] int64
    tree_mask: torch.Tensor


class Verified(NamedTuple):
    """A batch whose trees have just been verified."""

    # [num_tokens] int64, sequence positions of the KV slots
    positions: torch.Tensor
    # [num_reqs + 1] int32, each request's first token
    query_start_loc: torch.Tensor
    # [num_reqs] int32, how many of each request's last tokens verification rejected
    num_rejected: torch.Tensor
    # [num_reqs, depth + 1] int32, the accepted node of each depth, 0 first, -1 past the end; None
    # if no request had a tree
    paths: torch.Tensor | None
    # [max_num_reqs] float32
    temperature: torch.Tensor
    # [max_num_reqs] int64
    seeds: torch.Tensor


class DraftInputs(NamedTuple):
    """What a draft step reads of each request."""

    # [most_reqs] int64, the request's state; -1 for nobody
    idx_mapping: torch.Tensor
    # [most_reqs] int64, the row of its draft
    draft_rows: torch.Tensor
    # [most_reqs] int64, the position of its first row
    first_positions: torch.Tensor
    # [most_reqs] int64, the position of the root of the tree that is to be drafted
    root_positions: torch.Tensor
    # [most_reqs * rows_per_req] int64, of each of its rows, the token of the batch that gives the
    # hidden state
    sources: torch.Tensor
    # [num_draft_rows] float32, by the draft's row
    temperature: torch.Tensor
    # [num_draft_rows] int64, by the draft's row
    seeds: torch.Tensor


def lay_out(
    # written
    layout: Layout,
    # [num_tokens] int64
    slots: torch.Tensor,
    # [num_tokens] int32
    entries: torch.Tensor,
    # [num_entries] int64
    position_offsets: torch.Tensor,
    # [num_entries] int64
    until_offsets: torch.Tensor,
    # [num_entries] int64
    masks: torch.Tensor,
) -> None:
    """Look up where tokens stand and what they see.

    Args:
        layout: its first `num_tokens` tokens are written.
        slots: the tokens' sequence positions, of which a tree's nodes have consecutive ones.
        entries: each token's row of the tables that follow.
        position_offsets: what is added to a slot to give the RoPE position.
        until_offsets: what is added to a slot to give `visible_until`.
        masks: `tree_mask`.
    """
    if slots.is_cuda:
        from .kernel import lay_out as implementation
    else:
        implementation = lay_out_reference
    implementation(layout, slots, entries, position_offsets, until_offsets, masks)


def prepare_drafts(
    # written
    inputs: DraftInputs,
    # [3, most_reqs] int64
    requests: torch.Tensor,
    verified: Verified,
    rows_per_req: int,
) -> None:
    """Find what a draft step reads, where every request decodes: each has one token of its text in
    the batch, and below it a tree or nothing.

    Args:
        inputs: what is written, of as many requests as `requests` has.
        requests: of each request its state, its draft's row, and how many of its tokens the draft
            need not read again, 0 or 1. Padding requests have state -1, and a row that is
            nobody's, whose draft is greedy.
        verified: the batch, without the padding requests.
        rows_per_req: of `inputs.sources`.
    """
    if requests.is_cuda:
        from .kernel import prepare_drafts as implementation
    else:
        implementation = prepare_drafts_reference
    implementation(inputs, requests, verified, rows_per_req)
