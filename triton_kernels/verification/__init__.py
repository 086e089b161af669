# SPDX-License-Identifier: Apache-2.0
"""Verify a drafted tree: whatever the draft, the emitted tokens follow the target exactly."""

from ..arguments import Drafts, Requests, TargetRows, TreeTables, VerifiedPaths
from ..rules import builtin_rule


def verify_tree(
    target: TargetRows,
    drafts: Drafts,
    requests: Requests,
    tree: TreeTables,
    *,
    max_depth: int,
    rule: str,
    sharpening: float = 1.0,
) -> VerifiedPaths:
    """Accept a path of each request's tree, then emit a last token.

    At temperature 0 the walk follows the target's argmax (ties: lowest id). Otherwise a
    leaf-to-root rule visits the tree depth first, each node after its children with the
    probabilities that `node_rules.traversal_outcome` gives, and accepts the path to the first node
    whose draw succeeds. A root-to-leaf rule walks from the root while children are accepted: each
    node makes one draw among its children and rejection, by `node_rules.node_outcome`. The last
    token comes from the residual of the node where this ends, at a leaf from the target. A node
    whose children are not all among the request's first `num_nodes` drafted nodes counts as a
    leaf.

    Args:
        target: what is verified, and against which distributions.
        drafts: how the trees were drafted.
        requests: of each tree; as at drafting.
        tree: the shape of all of them.
        max_depth: depth of the tree's deepest leaf.
        rule: the built-in rule that children were drafted for.
        sharpening: the exponent that sampled children were drafted with.

    Raises:
        ValueError: a shape, `rule` or `sharpening` does not fit.
    """
    if target.logits.dim() != 2 or target.logits.stride(1) != 1:
        raise ValueError("target.logits must be [num_rows, vocab_size] with contiguous rows")
    num_rows, vocab_size = target.logits.shape
    if drafts.logits.dim() != 3 or drafts.logits.stride(2) != 1:
        raise ValueError(
            "drafts.logits must be [max_num_reqs, num_internal, vocab_size] with contiguous rows"
        )
    if drafts.logits.shape[2] != vocab_size:
        raise ValueError(
            f"drafts.logits has {drafts.logits.shape[2]} tokens, target.logits has {vocab_size}"
        )
    if drafts.sample_slots.shape != drafts.logits.shape[:2]:
        raise ValueError("sample_slots must be [max_num_reqs, num_internal], as drafts.logits is")
    num_reqs, max_num_reqs = target.row_start.shape, target.temperature.shape
    expected = {
        "node_tokens": (target.node_tokens, (num_rows,)),
        "num_nodes": (target.num_nodes, num_reqs),
        "req_idx": (requests.req_idx, num_reqs),
        "root_positions": (requests.root_positions, num_reqs),
        "requests.temperature": (requests.temperature, max_num_reqs),
        "seeds": (requests.seeds, max_num_reqs),
        "num_children": (tree.num_children, tree.first_child.shape),
        "internal_index": (tree.internal_index, tree.first_child.shape),
        "subtree_sizes": (tree.subtree_sizes, tree.first_child.shape),
    }
    for name, (value, shape) in expected.items():
        if value.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, not {list(value.shape)}")

    builtin_rule(rule, sharpening, max_children=1)
    if target.logits.is_cuda:
        from . import kernel as implementation
    else:
        from . import reference as implementation
    return implementation.verify_tree(
        target, drafts, requests, tree, max_depth=max_depth, rule=rule, sharpening=sharpening
    )
