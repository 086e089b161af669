# SPDX-License-Identifier: Apache-2.0
"""Draft up to `MAX_CHILDREN` children of tree nodes, by the law of a verification rule."""

import torch

from ..rules import check_rule

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
    rule: str,
    max_children: int,
    sharpening: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draft `k = num_children[row]` tokens for each row.

    SpecHub rules: the hubs are the k - 1 most probable tokens of `q = softmax(logits /
    temperature)` (ties: lowest id first) and the sampled child is drawn from `w`, which is
    `q ** sharpening` without the hubs, renormalised. Where nothing remains off the hubs, and at
    temperature 0, it is the best-ranked other token. Slots, `unordered`: the hubs by rank, then the
    sampled child. `ordered` and `traversal`: slot 0 holds the sampled child with probability
    `1 - q(hubs)` or else hub h with probability `q(h)`, so that without sharpening its token is
    distributed as q; the other hubs follow by rank, then the sampled child unless it comes first.

    `rrs`: every slot is an independent draw from q. `rrsw`: each is drawn from q without the tokens
    of the slots before it; what q does not support follows by lowest id. At temperature 0 both
    draft the k most probable tokens. `chain`: one draw from q.

    A row that masks every token is drafted as at temperature 0.

    Args:
        logits: any float dtype; -inf for masked tokens; last dimension contiguous.
        temperature: float32, per request; 0 is greedy.
        seeds: int64, per request.
        req_idx: integer index into the per-request tensors; -1 leaves the row undrafted.
        root_positions: int64, position of the tree's root in its sequence.
        node_ids: int32, the node whose children the row drafts.
        num_children: int32, 1..max_children.
        rule: one of `rules.RULES`; verification must use the same.
        max_children: the largest of `num_children`, at most MAX_CHILDREN.
        sharpening: the exponent of w, above 0; verification must use the same.

    Returns:
        tokens: int64 [num_rows, max_children], -1 past `num_children` and in undrafted rows.
        sample_slot: int32 [num_rows], slot of the sampled child, 0 for rules without one; -1 in
            undrafted rows.

    Raises:
        ValueError: a shape, `max_children`, `rule` or `sharpening` does not fit.
    """
    if logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError("logits must be [num_rows, vocab_size] with contiguous rows")
    num_rows, vocab_size = logits.shape
    check_rule(rule, sharpening, max_children)
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
        rule=rule,
        max_children=max_children,
        sharpening=sharpening,
    )
