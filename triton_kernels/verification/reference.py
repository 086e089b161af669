# SPDX-License-Identifier: Apache-2.0
"""Tree verification in plain PyTorch: what the kernels must reproduce.

`node_rules` has the mathematics of one node. Here whole trees are verified for all requests at
once: `_walk` from root to leaf, one node rule at a time, and `_traverse` from leaf to root.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .. import rng
from ..arguments import Drafts, Requests, TargetRows, TreeTables, VerifiedPaths
from ..constants import MAX_CHILDREN
from ..rules import BUILTIN_RULES
from .node_rules import (
    RecursiveDistribution,
    SpecHubDistribution,
    TraversalOutcome,
    draft_distribution,
    node_outcome,
    traversal_outcome,
)


@dataclass
class _Trees:
    """The arguments of `verify_tree`; `rows` below are indices of requests."""

    target: TargetRows
    drafts: Drafts
    requests: Requests
    tree: TreeTables
    rule: str
    sharpening: float

    def target_probs(
        self,
        # [num_rows]
        rows: torch.Tensor,
        # [num_rows]
        nodes: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The target's distribution [num_rows, vocab_size], a point mass for greedy requests; its
        best token [num_rows, 1]; which requests are greedy [num_rows, 1]."""
        target = self.target
        temperature = target.temperature[self.requests.req_idx[rows]].unsqueeze(1)
        greedy = temperature == 0
        logits = target.logits[target.row_start[rows] + nodes].to(torch.float32)
        probs = torch.softmax(logits * (1.0 / torch.where(greedy, 1.0, temperature)), dim=1)
        best = logits.argmax(dim=1, keepdim=True)
        probs.masked_fill_(greedy, 0.0)
        probs.scatter_add_(1, best, greedy.to(torch.float32))
        return probs, best, greedy

    def has_children(
        self,
        # [num_rows]
        rows: torch.Tensor,
        # [num_rows]
        nodes: torch.Tensor,
    ) -> torch.Tensor:
        """Which nodes have all their children among the nodes verified. [num_rows]"""
        count = self.tree.num_children[nodes]
        last_child = self.tree.first_child[nodes] + count - 1
        return (count > 0) & (last_child <= self.target.num_nodes[rows])

    def drafted(
        self,
        # [num_rows]
        rows: torch.Tensor,
        # [num_rows]
        nodes: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, SpecHubDistribution | RecursiveDistribution]:
        """The children [num_rows, MAX_CHILDREN] of nodes that have them, -1 past the last, the
        sampled child's slot [num_rows], and what they were drafted from."""
        slots = torch.arange(MAX_CHILDREN, device=rows.device)
        target, tree = self.target, self.tree
        child_rows = (target.row_start[rows] + tree.first_child[nodes]).unsqueeze(1) + slots
        children = target.node_tokens[child_rows.clamp_(max=len(target.node_tokens) - 1)].long()
        children.masked_fill_(slots >= tree.num_children[nodes].unsqueeze(1), -1)
        req = self.requests.req_idx[rows]
        state = (req, tree.internal_index[nodes])
        sample_slot = self.drafts.sample_slots[state].long()
        distribution = draft_distribution(
            self.drafts.logits[state].to(torch.float32),
            self.requests.temperature[req],
            children,
            sample_slot,
            rule=self.rule,
            sharpening=self.sharpening,
        )
        return children, sample_slot, distribution

    def draw(
        self,
        # [num_rows]
        rows: torch.Tensor,
        # broadcasts with [num_rows]
        nodes: torch.Tensor,
    ) -> torch.Tensor:
        """The uniform number that decides at each node. [num_rows]"""
        seeds = self.requests.seeds[self.requests.req_idx[rows]]
        positions = self.requests.root_positions[rows]
        return rng.uniform(rng.row_key(seeds, positions, nodes, rng.ACCEPT))


def verify_tree(
    target: TargetRows,
    drafts: Drafts,
    requests: Requests,
    tree: TreeTables,
    *,
    max_depth: int,
    rule: str,
    sharpening: float = 1.0,
    # [num_reqs, num_tree_nodes]
    visited: torch.Tensor | None = None,
) -> VerifiedPaths:
    """`verification.verify_tree` on any device, without argument checks.

    Args:
        visited: bool, set where the outcome depends on a node's rows: a kernel may read no others.
            The rows are the target's, and above temperature 0 the draft's of a node with children.
    """
    num_reqs, device = target.row_start.shape[0], target.logits.device
    if visited is None:
        visited = torch.empty(num_reqs, len(tree.first_child), dtype=torch.bool, device=device)
    visited.zero_()
    trees = _Trees(target, drafts, requests, tree, rule, sharpening)
    path = torch.full((num_reqs, max_depth + 1), -1, dtype=torch.int32, device=device)
    path[:, 0] = 0
    verify = _traverse if BUILTIN_RULES[rule].is_leaf_to_root else _walk
    residual = verify(trees, path, visited)

    # [num_reqs, max_depth + 1]
    following = path.roll(-1, dims=1)
    following[:, -1] = -1
    tokens = target.node_tokens[target.row_start.unsqueeze(1) + following.clamp(min=0)].long()
    tokens.masked_fill_(following < 0, -1)
    num_accepted = (following >= 0).sum(dim=1)
    last_node = path.gather(1, num_accepted.unsqueeze(1)).squeeze(1)
    seeds = requests.seeds[requests.req_idx]
    key = rng.row_key(seeds, requests.root_positions, last_node, rng.RESIDUAL)
    tokens.scatter_(1, num_accepted.unsqueeze(1), rng.draw(residual, key).unsqueeze(1))
    return VerifiedPaths(tokens, num_accepted.to(torch.int32) + 1, path)


def reach(
    target: TargetRows,
    drafts: Drafts,
    requests: Requests,
    tree: TreeTables,
    *,
    rule: str,
    sharpening: float = 1.0,
) -> torch.Tensor:
    """The probability that `verify_tree` accepts each node, given the drafted trees.

    Verification draws numbers, but for given drafts its chances have a closed form.

    Returns:
        float32 [num_reqs, num_tree_nodes], 1 for the root. The sum over a row is the expected
        number of emitted tokens, the bonus token included.
    """
    trees = _Trees(target, drafts, requests, tree, rule, sharpening)
    if BUILTIN_RULES[rule].is_leaf_to_root:
        return _reach_leaf_to_root(trees)
    everyone = torch.arange(len(target.row_start), device=target.logits.device)
    reached = torch.zeros(len(everyone), len(tree.first_child), device=everyone.device)
    reached[:, 0] = 1.0
    for node, count in enumerate(tree.num_children.tolist()):
        (rows,) = trees.has_children(everyone, torch.full_like(everyone, node)).nonzero(
            as_tuple=True
        )
        if rows.numel() == 0:
            continue
        at = torch.full_like(rows, node)
        probs, best, greedy = trees.target_probs(rows, at)
        children, sample_slot, distribution = trees.drafted(rows, at)
        accept = node_outcome(probs, distribution, children, sample_slot, rule=rule).accept
        # A greedy target accepts the first child that holds its best token, whatever the draft.
        match = (children == best).float()
        match *= match.cumsum(dim=1) == 1
        accept = torch.where(greedy, match, accept)[:, :count]
        first = int(tree.first_child[node])
        reached[rows, first : first + count] = reached[rows, node].unsqueeze(1) * accept
    return reached


def _walk(
    trees: _Trees,
    # [num_reqs, max_depth + 1], written: the accepted node of each depth after the root's
    path: torch.Tensor,
    # [num_reqs, num_tree_nodes] bool, written
    visited: torch.Tensor,
) -> torch.Tensor:
    """From the root to the first node that accepts no child. Returns what each request's last token
    is drawn from, unnormalised: [num_reqs, vocab_size]."""
    num_reqs, device = len(path), path.device
    residual = torch.empty(num_reqs, trees.target.logits.shape[1], device=device)
    node = torch.zeros(num_reqs, dtype=torch.int64, device=device)
    # Requests still walking. All of these lose the requests that stop.
    walking = torch.arange(num_reqs, device=device)
    for depth in range(path.shape[1]):
        at = node[walking]
        visited[walking, at] = True
        probs, best, greedy = trees.target_probs(walking, at)
        residual[walking] = probs  # what a leaf emits from
        (kept,) = trees.has_children(walking, at).nonzero(as_tuple=True)
        if kept.numel() == 0:
            break
        walking, at, probs, best, greedy = (v[kept] for v in (walking, at, probs, best, greedy))
        children, sample_slot, distribution = trees.drafted(walking, at)
        outcome = node_outcome(probs, distribution, children, sample_slot, rule=trees.rule)
        residual[walking] = torch.where(greedy, probs, outcome.residual)

        threshold = outcome.accept.cumsum(dim=1)
        total = threshold[:, -1] + outcome.reject
        draw = trees.draw(walking, at) * total
        # Slots passed over; all of them on rejection.
        slot = (threshold <= draw.unsqueeze(1)).sum(dim=1)
        # A greedy target accepts the first child that holds its best token, whatever the draft.
        missed = (children != best).cumprod(dim=1).sum(dim=1)
        slot = torch.where(greedy.squeeze(1), missed, slot)
        (kept,) = (slot < MAX_CHILDREN).nonzero(as_tuple=True)
        if kept.numel() == 0:
            break
        walking, slot = walking[kept], slot[kept]
        child = trees.tree.first_child[at[kept]] + slot
        node[walking] = child
        path[walking, depth + 1] = child.to(torch.int32)
    return residual


def _traverse(
    trees: _Trees,
    # [num_reqs, max_depth + 1], written: the accepted node of each depth after the root's
    path: torch.Tensor,
    # [num_reqs, num_tree_nodes] bool, written
    visited: torch.Tensor,
) -> torch.Tensor:
    """Depth first, each node after its children, until one is accepted.

    What a node is visited with depends on the tokens above it, not on what failed before it. So
    every node's chance is computed from the root down, and the first of the visiting order whose
    draw falls below it is accepted. Returns what each request's last token is drawn from,
    unnormalised: [num_reqs, vocab_size].
    """
    device = path.device
    everyone = torch.arange(len(path), device=device)
    visit, leave, start, finish = _visits(trees)
    parents = _parents(trees.tree)

    nodes = torch.arange(len(parents), device=device)
    draws = trees.draw(everyone.unsqueeze(1), nodes)
    accepted = finish.masked_fill(draws >= leave, len(parents) + 1).argmin(dim=1)
    # A leaf is visited with a chance that its parent gave, and read only to emit from it.
    read = (visit > 0) & trees.has_children(everyone.unsqueeze(1), nodes)
    read &= start < finish.gather(1, accepted.unsqueeze(1))
    visited.copy_(read | (nodes == accepted.unsqueeze(1)))

    residual, _, greedy = trees.target_probs(everyone, accepted)
    (rows,) = trees.has_children(everyone, accepted).nonzero(as_tuple=True)
    if rows.numel() > 0:
        at = accepted[rows]
        _, outcome = _visit_node(trees, rows, at, visit[rows, at], ordered=False)
        residual[rows] = torch.where(greedy[rows], residual[rows], outcome.residual)
    depths = [0] * len(parents)
    for node, parent in enumerate(parents[1:], start=1):
        depths[node] = depths[parent] + 1
    above, depth = torch.tensor(parents, device=device), torch.tensor(depths, device=device)
    for _ in range(1, path.shape[1]):
        path[everyone, depth[accepted]] = accepted.to(torch.int32)
        accepted = above[accepted]
    return residual


class _Visits(NamedTuple):
    """A leaf-to-root visit of every request's tree. [num_reqs, num_tree_nodes] each"""

    # the path acceptance that a node is visited with
    visit: torch.Tensor
    # the probability of accepting a node once its children have failed
    leave: torch.Tensor
    # how many nodes are left before a node's subtree is visited, and when the node itself is left
    start: torch.Tensor
    finish: torch.Tensor


def _parents(tree: TreeTables) -> list[int]:
    """Each node's parent, 0 for the root."""
    parents = [0] * len(tree.first_child)
    pairs = zip(tree.first_child.tolist(), tree.num_children.tolist(), strict=True)
    for node, (first, count) in enumerate(pairs):
        parents[first : first + count] = [node] * count
    return parents


def _visits(trees: _Trees) -> _Visits:
    num_reqs, device = len(trees.target.row_start), trees.target.logits.device
    first_child = trees.tree.first_child.tolist()
    num_children = trees.tree.num_children.tolist()
    sizes = trees.tree.subtree_sizes.tolist()
    everyone = torch.arange(num_reqs, device=device)
    visit = torch.zeros(num_reqs, len(sizes), device=device)
    visit[:, 0] = 1.0
    leave = torch.zeros_like(visit)
    start = torch.zeros(num_reqs, len(sizes), dtype=torch.int64, device=device)
    for node, count in enumerate(num_children):
        leave[:, node] = visit[:, node]
        at = torch.full_like(everyone, node)
        (rows,) = (trees.has_children(everyone, at) & (visit[:, node] > 0)).nonzero(as_tuple=True)
        if rows.numel() == 0:
            continue
        first = first_child[node]
        ordered = len(set(sizes[first : first + count])) > 1
        sample_slot, outcome = _visit_node(trees, rows, at[rows], visit[rows, node], ordered)
        leave[rows, node] = outcome.leave
        visit[rows, first : first + count] = outcome.visit[:, :count]
        # The sampled child's subtree comes first, the others' follow by slot.
        slots = torch.arange(count, device=device)
        size = torch.tensor(sizes[first : first + count], device=device)
        is_sample = slots == sample_slot.unsqueeze(1)
        before = (size * ~is_sample).cumsum(dim=1) - size + size[sample_slot].unsqueeze(1)
        start[rows, first : first + count] = start[rows, node : node + 1] + before.masked_fill(
            is_sample, 0
        )
    return _Visits(visit, leave, start, start + torch.tensor(sizes, device=device))


def _reach_leaf_to_root(trees: _Trees) -> torch.Tensor:
    visits = _visits(trees)
    # The root is accepted if all else has failed.
    visits.leave[:, 0] = 1.0
    # A node is accepted if all that was left before it failed. Nodes below one that is not visited
    # have no chance, whenever their turn is.
    order = visits.finish.argsort(dim=1, stable=True)
    in_order = visits.leave.gather(1, order)
    failed = (1 - in_order).cumprod(dim=1).roll(1, dims=1)
    failed[:, 0] = 1.0
    ends = torch.zeros_like(visits.leave).scatter_(1, order, failed * in_order)
    # The accepted path has a node if it ends there or below.
    for node, parent in reversed([*enumerate(_parents(trees.tree))][1:]):
        ends[:, parent] += ends[:, node]
    return ends


def _visit_node(
    trees: _Trees,
    # [num_rows]
    rows: torch.Tensor,
    # [num_rows]
    nodes: torch.Tensor,
    # [num_rows]
    path_acceptance: torch.Tensor,
    ordered: bool,
) -> tuple[torch.Tensor, TraversalOutcome]:
    probs, best, greedy = trees.target_probs(rows, nodes)
    children, sample_slot, distribution = trees.drafted(rows, nodes)
    # recursive rules verify from the root
    assert isinstance(distribution, SpecHubDistribution)
    outcome = traversal_outcome(
        probs, distribution, children, sample_slot, path_acceptance, ordered=ordered
    )
    # A greedy target accepts the child that holds its best token, whatever the draft.
    match = (children == best).to(torch.float32)
    outcome = outcome._replace(
        visit=torch.where(greedy, match, outcome.visit),
        leave=torch.where(greedy.squeeze(1), path_acceptance, outcome.leave),
    )
    return sample_slot, outcome
