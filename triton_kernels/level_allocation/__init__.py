# SPDX-License-Identifier: Apache-2.0
"""Decide, for each request, which nodes of a level get how many children, before any is drawn.

The level below has a fixed number of nodes. They go, one after the other, where they add most to
the expected number of accepted tokens. With `q` a node's draft and `r` how likely the node is
expected to be accepted, `k` children of which a rule makes `m` hubs are worth

    r v(k),   v(k) = q_1 + .. + q_m + z (1 - 0.45 z) + 0.11 z + 0.05 z + 0.03 z   (k - m samples)

where `q_j` are the largest probabilities and `z = 1 - q_1 - .. - q_m`; a lone sample is worth
`0.5 + 0.5 q_1^2`. The k-th child adds `r` times the least of what the first k add to the best of
those before, so that what a node's children add falls. Greedy requests' children are all hubs.

Lossless, from the root and from the leaves: the slots of a level are fixed before any of its tokens
is drawn and none is removed, so which siblings a node or an ancestor of it has never depends on a
token at or below the node. What hangs below siblings may depend on anything drawn before. The
estimates decide nothing but lengths.
"""

import torch

from ..arguments import GrownTrees, Requests
from ..constants import MAX_CHILDREN
from ..rules import builtin_rule


def allocate_children(
    # [num_reqs * width, vocab_size], a request's nodes side by side
    logits: torch.Tensor,
    requests: Requests,
    trees: GrownTrees,
    *,
    first_node: int,
    width: int,
    width_below: int,
    rule: str,
) -> None:
    """Decide the children of one level's nodes, and write them to the requests' rows of `trees`:
    the nodes' first child and their number, and the children's parents, ancestors and `reach`.

    The children of the level are numbered by parent. A leaf's first child is where it would be, so
    that a row of `trees` that several requests write at once, which is nobody's, never seems to
    have a node without drafts. Of equal gains, the earlier node's count
    first, then its earlier child. `reach` of a child is its node's, times what its slot is expected
    to be accepted with, in the order in which `child_sampling` puts children into slots; never a
    function of a token.

    Args:
        logits: the draft's, any float dtype; -inf for masked tokens; last dimension contiguous.
        requests: whose trees these are; one with `req_idx` -1 is left out.
        trees: of which the levels down to this one are decided.
        first_node: the number of the level's first node.
        width: the number of its nodes.
        width_below: the number of children that they get, at most MAX_CHILDREN each.
        rule: the built-in rule that will draw them.

    Raises:
        ValueError: a shape or `rule` does not fit.
    """
    num_reqs = len(requests.req_idx)
    if logits.dim() != 2 or logits.stride(1) != 1 or len(logits) != num_reqs * width:
        raise ValueError(
            f"logits must be [num_reqs * width, vocab_size] with contiguous rows, {num_reqs} * "
            f"{width} rows, not {list(logits.shape)}"
        )
    num_nodes = trees.tables.num_nodes
    if not 1 <= width_below <= MAX_CHILDREN * width:
        raise ValueError(f"width_below must be in 1..{MAX_CHILDREN * width}, not {width_below}")
    if first_node + width + width_below > num_nodes:
        raise ValueError(f"trees have {num_nodes} nodes, too few for this level")
    shape = (len(trees.reach), num_nodes)
    for name, table in (
        ("first_child", trees.tables.first_child),
        ("num_children", trees.tables.num_children),
        ("parents", trees.tables.parents),
        ("ancestor_masks", trees.ancestor_masks),
        ("reach", trees.reach),
    ):
        if table.shape != shape or not table.is_contiguous():
            raise ValueError(
                f"{name} must be {list(shape)} and contiguous, not {list(table.shape)}"
            )
    builtin_rule(rule, 1.0, min(MAX_CHILDREN, width_below))
    if logits.is_cuda:
        from . import kernel as implementation
    else:
        from . import reference as implementation
    implementation.allocate_children(
        logits,
        requests,
        trees,
        first_node=first_node,
        width=width,
        width_below=width_below,
        rule=rule,
    )
