# SPDX-License-Identifier: Apache-2.0
"""Draft the children of tree nodes: the hubs and one sample off the hubs.

SpecHub (Sun et al., EMNLP 2024, arXiv 2411.05289) for up to `MAX_CHILDREN` children.
"""

import torch

MAX_CHILDREN = 4


def sample_children(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    # [max_num_reqs]
    temperature: torch.Tensor,
    # [max_num_reqs]
    seeds: torch.Tensor,
    # [num_rows]
    req_idx: torch.Tensor,
    # [num_rows]
    root_positions: torch.Tensor,
    # [num_rows]
    node_ids: torch.Tensor,
    # [num_rows]
    num_children: torch.Tensor,
    *,
    ordered: bool,
    max_children: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draft `k = num_children[row]` different tokens for each row.

    With `q = softmax(logits / temperature)`, the hubs are the k - 1 most probable tokens (ties:
    lowest id first) and the sampled child is drawn from `q` without the hubs, renormalised. Where
    nothing remains off the hubs, and at temperature 0, it is the best-ranked other token.

    Slots, unordered: the hubs by rank, then the sampled child. Ordered: slot 0 holds the sampled
    child with probability `1 - q(hubs)` or else hub h with probability `q(h)`, so that its token is
    distributed as q; the other hubs follow by rank, then the sampled child unless it comes first.

    Args:
        logits: any float dtype; -inf for masked tokens; last dimension contiguous.
        temperature: float32, per request; 0 is greedy.
        seeds: int64, per request.
        req_idx: integer index into the per-request tensors; -1 leaves the row undrafted.
        root_positions: int64, position of the tree's root in its sequence.
        node_ids: int32, the node whose children the row drafts.
        num_children: int32, 1..max_children.
        ordered: which slot order to produce; verification must use the same.
        max_children: the largest of `num_children`, at most MAX_CHILDREN.

    Returns:
        tokens: int64 [num_rows, max_children], -1 past `num_children` and in undrafted rows.
        sample_slot: int32 [num_rows], slot of the sampled child; -1 in undrafted rows.

    Raises:
        ValueError: a shape or `max_children` does not fit.
    """
    if logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError("logits must be [num_rows, vocab_size] with contiguous rows")
    num_rows, vocab_size = logits.shape
    if not 1 <= max_children <= min(MAX_CHILDREN, vocab_size):
        raise ValueError(f"max_children must be in 1..{min(MAX_CHILDREN, vocab_size)}")
    for name, value in (
        ("req_idx", req_idx),
        ("root_positions", root_positions),
        ("node_ids", node_ids),
        ("num_children", num_children),
    ):
        if value.shape != (num_rows,):
            raise ValueError(f"{name} must be [num_rows] = [{num_rows}], not {list(value.shape)}")
    if temperature.dim() != 1 or seeds.shape != temperature.shape:
        raise ValueError("temperature and seeds must both be [max_num_reqs]")

    if logits.is_cuda:
        from . import kernel as implementation
    else:
        from . import reference as implementation
    return implementation.sample_children(
        logits,
        temperature,
        seeds,
        req_idx,
        root_positions,
        node_ids,
        num_children,
        ordered=ordered,
        max_children=max_children,
    )
