# SPDX-License-Identifier: Apache-2.0
"""Verify a drafted tree: whatever the draft, the emitted tokens follow the target exactly."""

from collections.abc import Sequence

from ..arguments import Drafts, Requests, TargetRows, TreeTables, VerifiedPaths
from ..rules import builtin_rule


def verify_tree(
    target: TargetRows,
    drafts: Drafts,
    requests: Requests,
    tree: TreeTables,
    *,
    level_sizes: Sequence[int],
    rule: str,
    sharpening: float = 1.0,
) -> VerifiedPaths:
    """Accept a path of each request's tree, then emit a last token.

    `node` has the mathematics of one node. A root-to-leaf rule walks from the root: it accepts a
    child with the chance that `node.node_outcome` gives, samples before hubs, and stops at the
    first node that accepts none. A leaf-to-root rule visits the tree depth first, each node after
    its children, and accepts the path to the first node whose coin falls below its chance. The
    last token comes from the residual of the node where this ends, at a leaf from the target. At
    temperature 0 the target is a point mass on its argmax (ties: lowest id). A node whose children
    are not all among the request's first `num_nodes` drafted nodes counts as a leaf.

    Args:
        target: what is verified, and against which distributions.
        drafts: how the trees were drafted.
        requests: of each tree; as at drafting.
        tree: the shape of all of them, or of each request's.
        level_sizes: nodes of every depth, the root's one first.
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
    if drafts.sampled.shape != drafts.logits.shape[:2]:
        raise ValueError("drafts.sampled must be [max_num_reqs, num_internal], as drafts.logits is")
    num_reqs, max_num_reqs = target.row_start.shape, target.temperature.shape
    expected = {
        "node_tokens": (target.node_tokens, (num_rows,)),
        "num_nodes": (target.num_nodes, num_reqs),
        "req_idx": (requests.req_idx, num_reqs),
        "root_positions": (requests.root_positions, num_reqs),
        "requests.temperature": (requests.temperature, max_num_reqs),
        "seeds": (requests.seeds, max_num_reqs),
        "num_children": (tree.num_children, tree.first_child.shape),
        "internal_index": (tree.internal_index, tree.first_child.shape[-1:]),
        "parents": (tree.parents, tree.first_child.shape),
    }
    if tree.first_child.dim() > 1:
        shape = (len(drafts.sampled), tree.num_nodes)
        expected["first_child"] = (tree.first_child, shape)
    for name, (value, shape) in expected.items():
        if value.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, not {list(value.shape)}")

    builtin_rule(rule, sharpening, max_children=1)
    if target.logits.is_cuda:
        from . import kernel as implementation
    else:
        from . import reference as implementation
    return implementation.verify_tree(
        target, drafts, requests, tree, level_sizes=level_sizes, rule=rule, sharpening=sharpening
    )
