# SPDX-License-Identifier: Apache-2.0
"""Tree verification in plain PyTorch: what the kernels must reproduce.

What a node is visited with depends on the tokens above it, not on what failed before it. So the
chances of all nodes are computed level by level, `node.node_outcome` at a time. Then coins are
tossed in the order of visits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import rng
from ..arguments import Drafts, Requests, TargetRows, TreeTables, VerifiedPaths
from ..constants import LOWEST, MAX_CHILDREN
from ..logits import finite
from ..rules import BUILTIN_RULES, Rule
from .node import NodeOutcome, node_outcome


class _Chances(NamedTuple):
    """What coins are compared with."""

    # [num_reqs, num_tree_nodes]: what a node is visited with; from root to leaf, accepted with
    visit: torch.Tensor
    # [num_reqs, num_tree_nodes]: what a node is accepted with once its children have failed
    leave: torch.Tensor


class _Trees(NamedTuple):
    target: TargetRows
    drafts: Drafts
    requests: Requests
    # of each request of the batch
    tables: TreeTables
    rule: Rule
    sharpening: float

    def target_probs(
        self,
        # [num_rows], places in the batch
        rows: torch.Tensor,
        # [num_rows]
        nodes: torch.Tensor,
    ) -> torch.Tensor:
        """[num_rows, vocab_size], a point mass for greedy requests, and on token 0 where every
        token is masked."""
        temperature = self.target.temperature[self.requests.req_idx[rows]].unsqueeze(1)
        logits = finite(self.target.logits[self.target.row_start[rows] + nodes])
        peak, best = logits.max(dim=1, keepdim=True)
        certain = (temperature == 0) | (peak == LOWEST)
        scale = 1.0 / torch.where(temperature == 0, 1.0, temperature)
        probs = torch.softmax((logits - peak) * scale, dim=1)
        return torch.where(certain, torch.zeros_like(probs).scatter_(1, best, 1.0), probs)

    def has_children(
        self,
        # [num_rows]
        rows: torch.Tensor,
        # [num_rows]
        nodes: torch.Tensor,
    ) -> torch.Tensor:
        """Which nodes have all their children among the nodes verified. [num_rows] bool"""
        count = self.tables.num_children[rows, nodes]
        last = self.tables.first_child[rows, nodes] + count - 1
        return (count > 0) & (last <= self.target.num_nodes[rows])

    def outcome(
        self,
        # [num_rows]
        rows: torch.Tensor,
        # [num_rows]
        nodes: torch.Tensor,
        # [num_rows]
        acceptance: torch.Tensor,
    ) -> NodeOutcome:
        """Of nodes that have children."""
        slots = torch.arange(MAX_CHILDREN, device=rows.device)
        tokens = self.target.node_tokens
        first = self.target.row_start[rows] + self.tables.first_child[rows, nodes]
        places = first.unsqueeze(1) + slots
        children = tokens[places.clamp_(max=len(tokens) - 1)].long()
        children.masked_fill_(slots >= self.tables.num_children[rows, nodes].unsqueeze(1), -1)
        req, inner = self.requests.req_idx[rows], self.tables.internal_index[nodes]
        temperature = self.requests.temperature[req]
        scale = self.sharpening / torch.where(temperature == 0, 1.0, temperature)
        drafted = finite(self.drafts.logits[req, inner])
        scaled = (drafted * scale.unsqueeze(1)).clamp(max=-LOWEST)
        return node_outcome(
            self.target_probs(rows, nodes),
            scaled.masked_fill(drafted == LOWEST, -torch.inf),
            children,
            (self.drafts.sampled[req, inner].unsqueeze(1) >> slots) % 2 == 1,
            acceptance,
            replaced=self.rule.replaces,
        )


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
    """`verification.verify_tree` on any device, without argument checks."""
    own = tree.of(requests.req_idx.long())
    trees = _Trees(target, drafts, requests, own, BUILTIN_RULES[rule], sharpening)
    num_reqs, device = len(target.row_start), target.logits.device
    chances = _chances(trees)
    last_node = _last_nodes(trees, chances)

    everyone = torch.arange(num_reqs, device=device)
    weights = trees.target_probs(everyone, last_node)
    (inner,) = trees.has_children(everyone, last_node).nonzero(as_tuple=True)
    if len(inner):
        at = last_node[inner]
        acceptance = torch.ones_like(weights[inner, 0])
        if trees.rule.is_leaf_to_root:
            acceptance = chances.visit[inner, at]
        weights[inner] = trees.outcome(inner, at, acceptance).residual
    key = rng.row_key(
        requests.seeds[requests.req_idx], requests.root_positions, last_node, rng.RESIDUAL
    )
    return _paths(trees, last_node, rng.draw(weights, key), len(level_sizes) - 1)


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
    own = tree.of(requests.req_idx.long())
    trees = _Trees(target, drafts, requests, own, BUILTIN_RULES[rule], sharpening)
    chances, turn, parents = _chances(trees), _turns(trees), own.parents.long()
    if not trees.rule.is_leaf_to_root:
        failed = _before(trees, turn, 1.0 - chances.visit, 1.0).prod(dim=2)
        reached = failed * chances.visit
        reached[:, 0] = 1.0
        for node in range(1, own.num_nodes):
            reached[:, node] *= reached.gather(1, parents[:, node : node + 1]).squeeze(1)
        return reached
    # A node is accepted if all that had their turn before it failed, and the path may end there or
    # below.
    order = _finish(trees, turn).argsort(dim=1)
    leave = chances.leave.gather(1, order)
    failed = (1.0 - leave).cumprod(dim=1).roll(1, dims=1)
    failed[:, 0] = 1.0
    reached = torch.zeros_like(leave).scatter_(1, order, failed * leave)
    _add_to_parents(parents, reached)
    return reached


def _add_to_parents(
    # [num_reqs, num_tree_nodes]
    parents: torch.Tensor,
    # [num_reqs, num_tree_nodes], each node's own; its subtree's sum on return
    values: torch.Tensor,
) -> None:
    for node in range(parents.shape[1] - 1, 0, -1):
        column = slice(node, node + 1)
        values.scatter_add_(1, parents[:, column], values[:, column].clone())


def _before(
    trees: _Trees,
    # [num_reqs, num_tree_nodes]
    turn: torch.Tensor,
    # [num_reqs, num_tree_nodes]
    values: torch.Tensor,
    other: float,
) -> torch.Tensor:
    """The values of the siblings whose turn is before a node's, of other nodes another value.
    [num_reqs, num_tree_nodes, num_tree_nodes]"""
    parents = trees.tables.parents.clone()
    parents[:, 0] = -1  # the root has no siblings
    siblings = parents.unsqueeze(2) == parents.unsqueeze(1)
    before = siblings & (turn.unsqueeze(1) < turn.unsqueeze(2))
    return torch.where(before, values.unsqueeze(1), other)


def _chances(trees: _Trees) -> _Chances:
    """Every node's, from the root down."""
    num_reqs, num_nodes = len(trees.target.row_start), trees.tables.num_nodes
    device = trees.target.logits.device
    visit = torch.zeros(num_reqs, num_nodes, device=device)
    visit[:, 0] = 1.0
    leave = torch.ones_like(visit)
    everyone = torch.arange(num_reqs, device=device)
    for node in range(num_nodes):
        at = torch.full_like(everyone, node)
        if trees.rule.is_leaf_to_root:
            leave[:, node] = visit[:, node]
        (rows,) = (trees.has_children(everyone, at) & (visit[:, node] > 0)).nonzero(as_tuple=True)
        if len(rows) == 0:
            continue
        outcome = trees.outcome(rows, at[rows], leave[rows, node])
        first, count = trees.tables.first_child[rows, node], trees.tables.num_children[rows, node]
        for slot in range(int(count.max())):
            (present,) = (slot < count).nonzero(as_tuple=True)
            child = first[present].long() + slot
            visit[rows[present], child] = outcome.visit[present, slot]
        if trees.rule.is_leaf_to_root:
            leave[rows, node] = outcome.leave
    leave[:, 0] = 1.0
    return _Chances(visit, leave)


def _turns(trees: _Trees) -> torch.Tensor:
    """Of every node among its siblings: samples by slot, then hubs by slot. [num_reqs,
    num_tree_nodes]"""
    tree, req = trees.tables, trees.requests.req_idx.unsqueeze(1)
    parents = tree.parents.long()
    nodes = torch.arange(tree.num_nodes, device=parents.device)
    slots = nodes - tree.first_child.gather(1, parents)
    sampled = (trees.drafts.sampled[req, tree.internal_index[parents]] >> slots) % 2 == 1
    return torch.where(sampled, slots, slots + MAX_CHILDREN)


def _finish(
    trees: _Trees,
    # [num_reqs, num_tree_nodes]
    turn: torch.Tensor,
) -> torch.Tensor:
    """When each node's turn comes, depth first, each after its children. [num_reqs,
    num_tree_nodes]"""
    parents = trees.tables.parents.long()
    sizes = torch.ones_like(turn)
    _add_to_parents(parents, sizes)
    begin = _before(trees, turn, sizes, 0).sum(dim=2)
    for node in range(1, parents.shape[1]):
        begin[:, node] += begin.gather(1, parents[:, node : node + 1]).squeeze(1)
    return begin + sizes


def _last_nodes(trees: _Trees, chances: _Chances) -> torch.Tensor:
    """The node at which each request's path ends. [num_reqs]"""
    parents = trees.tables.parents.long()
    num_nodes = trees.tables.num_nodes
    nodes = torch.arange(num_nodes, device=parents.device)
    seeds = trees.requests.seeds[trees.requests.req_idx].unsqueeze(1)
    positions = trees.requests.root_positions.unsqueeze(1)
    coins = rng.uniform(rng.row_key(seeds, positions, nodes, rng.ACCEPT))
    turn = _turns(trees)
    if trees.rule.is_leaf_to_root:
        finish = _finish(trees, turn)
        return finish.masked_fill(coins >= chances.leave, num_nodes + 1).argmin(dim=1)
    accepted = (coins < chances.visit) & (nodes > 0)
    node = torch.zeros_like(trees.requests.root_positions)
    for _ in nodes:
        children = accepted & (parents == node.unsqueeze(1))
        going = children.any(dim=1)
        if not going.any():
            break
        next_node = turn.masked_fill(~children, 2 * MAX_CHILDREN).argmin(dim=1)
        node = torch.where(going, next_node, node)
    return node


def _paths(
    trees: _Trees,
    # [num_reqs]
    last_node: torch.Tensor,
    # [num_reqs]
    last_token: torch.Tensor,
    max_depth: int,
) -> VerifiedPaths:
    target, parents = trees.target, trees.tables.parents.long()
    num_reqs, device = len(last_node), last_node.device
    # from the last node up to the root, then turned around
    above = [last_node]
    for _ in range(max_depth):
        above.append(parents.gather(1, above[-1].unsqueeze(1)).squeeze(1))
    depth = (torch.stack(above) > 0).sum(dim=0)
    path = torch.full((num_reqs, max_depth + 1), -1, dtype=torch.int32, device=device)
    tokens = torch.full((num_reqs, max_depth + 1), -1, dtype=torch.int64, device=device)
    everyone = torch.arange(num_reqs, device=device)
    for up, node in enumerate(above):
        (rows,) = (depth >= up).nonzero(as_tuple=True)
        path[rows, depth[rows] - up] = node[rows].to(torch.int32)
        (rows,) = (depth > up).nonzero(as_tuple=True)
        accepted = target.node_tokens[target.row_start[rows] + node[rows]].long()
        tokens[rows, depth[rows] - up - 1] = accepted
    tokens[everyone, depth] = last_token
    return VerifiedPaths(tokens, depth.to(torch.int32) + 1, path)
