# SPDX-License-Identifier: Apache-2.0
"""Draft up to `MAX_CHILDREN` children of tree nodes, as a verification rule has it."""

import torch

from ..arguments import Children, Requests
from ..constants import MAX_CHILDREN
from ..rules import builtin_rule


def sample_children(
    # [num_rows, vocab_size]
    logits: torch.Tensor,
    # [num_rows]
    node_ids: torch.Tensor,
    # [num_rows]
    num_children: torch.Tensor,
    # of each row
    requests: Requests,
    *,
    rule: str,
    max_children: int,
    sharpening: float = 1.0,
) -> Children:
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
        node_ids: int32, the node whose children the row drafts.
        num_children: int32, 1..max_children.
        requests: whose rows these are.
        rule: a built-in rule's name; verification must use the same.
        max_children: the largest of `num_children`, at most MAX_CHILDREN.
        sharpening: the exponent of w, above 0; verification must use the same.

    Raises:
        ValueError: a shape, `max_children`, `rule` or `sharpening` does not fit.
    """
    if logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError("logits must be [num_rows, vocab_size] with contiguous rows")
    num_rows, vocab_size = logits.shape
    if not 1 <= max_children <= min(MAX_CHILDREN, vocab_size):
        raise ValueError(f"max_children must be in 1..{min(MAX_CHILDREN, vocab_size)}")
    builtin_rule(rule, sharpening, max_children)
    for name, value in (
        ("req_idx", requests.req_idx),
        ("root_positions", requests.root_positions),
        ("node_ids", node_ids),
        ("num_children", num_children),
    ):
        if value.shape != (num_rows,):
            raise ValueError(f"{name} must be [num_rows] = [{num_rows}], not {list(value.shape)}")
    if requests.temperature.dim() != 1 or requests.seeds.shape != requests.temperature.shape:
        raise ValueError("temperature and seeds must both be [max_num_reqs]")

    if logits.is_cuda:
        from . import kernel as implementation
    else:
        from . import reference as implementation
    return implementation.sample_children(
        logits,
        node_ids,
        num_children,
        requests,
        rule=rule,
        max_children=max_children,
        sharpening=sharpening,
    )
