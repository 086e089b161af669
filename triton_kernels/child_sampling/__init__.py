# SPDX-License-Identifier: Apache-2.0
"""Draft up to `MAX_CHILDREN` children of tree nodes, as a verification rule has it."""

import torch

from ..arguments import Children, KeptRows, Requests
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
    keep: KeptRows | None = None,
) -> Children:
    """Draft `k = num_children[row]` tokens for each row.

    With `q = softmax(logits / temperature)`, the hubs are the most probable tokens, as many as the
    rule has it: none, those with q > `constants.CONFIDENT` (1 to k - 1), k - 1 or k. The other
    children are samples, drawn from `q ** sharpening` off the hubs: independently, or each off the
    samples before it. Where nothing is left to draw from, the next token in rank is taken, and is
    no sample, as it was chosen without chance. At temperature 0, and where a row masks every token,
    all children are hubs. NaN masks a token. Of equal logits the first lane's ranks first (`rng`).

    Slots: rules that rank subtrees put the child first whose expected acceptance is the largest,
    computed from q alone: q(h) for hub h, and for the samples z (1 - 0.45 z), 0.11 z, 0.05 z, 0.03
    z, where z is the draft's mass off the hubs; samples win ties. Other rules have the hubs by
    rank, then the samples as they were drawn.

    Args:
        logits: any float dtype; -inf for masked tokens; last dimension contiguous.
        node_ids: int32, the node whose children the row drafts.
        num_children: int32, 1..max_children.
        requests: whose rows these are.
        rule: a built-in rule's name; verification must use the same.
        max_children: the largest of `num_children`, at most MAX_CHILDREN.
        sharpening: the exponent of q off the hubs, above 0; verification must use the same.
        keep: where to keep the rows for verification, if anywhere.

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

    if keep is not None:
        kept = keep.logits
        if kept.dim() != 3 or kept.shape[2] != vocab_size or kept.stride(2) != 1:
            raise ValueError(
                f"keep.logits must be [max_num_reqs, num_internal, {vocab_size}], rows contiguous"
            )
        if kept.dtype != logits.dtype:
            raise ValueError(f"keep.logits is {kept.dtype}, logits are {logits.dtype}")

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
        keep=keep,
    )
