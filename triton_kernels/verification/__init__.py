# SPDX-License-Identifier: Apache-2.0
"""Verify a drafted tree: whatever the draft, the emitted tokens follow the target exactly."""

import torch

from ..rules import check_rule


def verify_tree(
    # [num_rows, vocab_size]
    target_logits: torch.Tensor,
    # [num_reqs]
    row_start: torch.Tensor,
    # [num_reqs]
    num_nodes: torch.Tensor,
    # [num_rows]
    node_tokens: torch.Tensor,
    # [max_num_reqs, num_internal, vocab_size]
    draft_logits: torch.Tensor,
    # [max_num_reqs, num_internal]
    sample_slots: torch.Tensor,
    # [num_reqs]
    req_idx: torch.Tensor,
    # [max_num_reqs]
    target_temperature: torch.Tensor,
    # [max_num_reqs]
    draft_temperature: torch.Tensor,
    # [max_num_reqs]
    seeds: torch.Tensor,
    # [num_reqs]
    root_positions: torch.Tensor,
    # [num_tree_nodes]
    first_child: torch.Tensor,
    # [num_tree_nodes]
    num_children: torch.Tensor,
    # [num_tree_nodes]
    internal_index: torch.Tensor,
    # [num_tree_nodes]
    subtree_sizes: torch.Tensor,
    *,
    max_depth: int,
    rule: str,
    sharpening: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Accept a path of each request's tree, then emit a last token.

    At temperature 0 the walk follows the target's argmax (ties: lowest id). Otherwise `traversal`
    visits the tree depth first, each node after its children with the probabilities that
    `node_rules.traversal_outcome` gives, and accepts the path to the first node whose draw
    succeeds. The other rules walk from the root while children are accepted: each node makes one
    draw among its children and rejection, by `node_rules.node_outcome`. The last token comes from
    the residual of the node where this ends, at a leaf from the target. A node whose children are
    not all among the request's first `num_nodes` drafted nodes counts as a leaf.

    Args:
        target_logits: any float dtype; request r's row of a node is `row_start[r] + node`; -inf for
            masked tokens; last dimension contiguous.
        row_start: int32, first row of each request: its root.
        num_nodes: int32, drafted nodes verified per request, 0..num_tree_nodes - 1.
        node_tokens: integer, the token of each row's node; the roots' are not read.
        draft_logits: any float dtype, the logits that each internal node's children were drafted
            from; last dimension contiguous.
        sample_slots: int32, which child of each internal node is the sampled one; not read for
            rules without one.
        req_idx: integer index into the per-request-state tensors.
        target_temperature: float32, what `target_logits` must still be divided by; 0 is greedy.
        draft_temperature: float32, the temperature that children were drafted with.
        seeds: int64, the seeds that children were drafted with.
        root_positions: int64, position of each tree's root in its sequence, as at drafting.
        first_child: int32, breadth-first id of each node's first child; 0 at leaves.
        num_children: int32, 0..4.
        internal_index: int32, row of each internal node in `draft_logits`; -1 at leaves.
        subtree_sizes: integer, nodes in each node's subtree, itself included.
        max_depth: depth of the tree's deepest leaf.
        rule: what children were drafted for, one of `rules.RULES`.
        sharpening: the exponent that sampled children were drafted with.

    Returns:
        tokens: int64 [num_reqs, max_depth + 1], the accepted tokens, then the residual or bonus
            token, then -1.
        num_emitted: int32 [num_reqs], accepted tokens plus one.
        path: int32 [num_reqs, max_depth + 1], the accepted node at each depth, from the root's 0;
            -1 past the last accepted one.

    Raises:
        ValueError: a shape, `rule` or `sharpening` does not fit.
    """
    if target_logits.dim() != 2 or target_logits.stride(1) != 1:
        raise ValueError("target_logits must be [num_rows, vocab_size] with contiguous rows")
    num_rows, vocab_size = target_logits.shape
    if draft_logits.dim() != 3 or draft_logits.stride(2) != 1:
        raise ValueError(
            "draft_logits must be [max_num_reqs, num_internal, vocab_size] with contiguous rows"
        )
    if draft_logits.shape[2] != vocab_size:
        raise ValueError(
            f"draft_logits has {draft_logits.shape[2]} tokens, target_logits has {vocab_size}"
        )
    if sample_slots.shape != draft_logits.shape[:2]:
        raise ValueError("sample_slots must be [max_num_reqs, num_internal], as draft_logits is")
    expected = {
        "node_tokens": (node_tokens, (num_rows,)),
        "num_nodes": (num_nodes, row_start.shape),
        "req_idx": (req_idx, row_start.shape),
        "root_positions": (root_positions, row_start.shape),
        "draft_temperature": (draft_temperature, target_temperature.shape),
        "seeds": (seeds, target_temperature.shape),
        "num_children": (num_children, first_child.shape),
        "internal_index": (internal_index, first_child.shape),
        "subtree_sizes": (subtree_sizes, first_child.shape),
    }
    for name, (value, shape) in expected.items():
        if value.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, not {list(value.shape)}")

    check_rule(rule, sharpening, max_children=1)
    if target_logits.is_cuda:
        from . import kernel as implementation
    else:
        from . import reference as implementation
    return implementation.verify_tree(
        target_logits,
        row_start,
        num_nodes,
        node_tokens,
        draft_logits,
        sample_slots,
        req_idx,
        target_temperature,
        draft_temperature,
        seeds,
        root_positions,
        first_child,
        num_children,
        internal_index,
        subtree_sizes,
        max_depth=max_depth,
        rule=rule,
        sharpening=sharpening,
    )
