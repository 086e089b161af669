# SPDX-License-Identifier: Apache-2.0
"""Tree verification in plain PyTorch: what the kernel must reproduce, and the host version.

`node_rules` has the mathematics of one node. Here whole trees are verified for all requests at
once: `_walk` from root to leaf, one node rule at a time, and `_traverse` from leaf to root.
"""

from dataclasses import dataclass

import torch

from .. import rng
from .node_rules import TraversalOutcome, draft_law, node_outcome, traversal_outcome

MAX_CHILDREN = 4


@dataclass
class _Trees:
    """The arguments of `verify_tree`; `rows` below are indices of requests."""

    # [num_rows, vocab_size]
    target_logits: torch.Tensor
    # [num_reqs]
    row_start: torch.Tensor
    # [num_reqs]
    num_nodes: torch.Tensor
    # [num_rows]
    node_tokens: torch.Tensor
    # [max_num_reqs, num_internal, vocab_size]
    draft_logits: torch.Tensor
    # [max_num_reqs, num_internal]
    sample_slots: torch.Tensor
    # [num_reqs]
    req_idx: torch.Tensor
    # [max_num_reqs]
    target_temperature: torch.Tensor
    # [max_num_reqs]
    draft_temperature: torch.Tensor
    # [max_num_reqs]
    seeds: torch.Tensor
    # [num_reqs]
    root_positions: torch.Tensor
    # [num_tree_nodes]
    first_child: torch.Tensor
    # [num_tree_nodes]
    num_children: torch.Tensor
    # [num_tree_nodes]
    internal_index: torch.Tensor
    # [num_tree_nodes]
    subtree_sizes: torch.Tensor
    rule: str
    sharpening: float
    # [num_reqs, num_tree_nodes] bool, written
    visited: torch.Tensor

    def target_probs(
        self,
        # [num_rows]
        rows: torch.Tensor,
        # [num_rows]
        nodes: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The target's law [num_rows, vocab_size], a point mass for greedy requests; its best token
        [num_rows, 1]; which requests are greedy [num_rows, 1]."""
        temperature = self.target_temperature[self.req_idx[rows]].unsqueeze(1)
        greedy = temperature == 0
        logits = self.target_logits[self.row_start[rows] + nodes].to(torch.float32)
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
        count = self.num_children[nodes]
        return (count > 0) & (self.first_child[nodes] + count - 1 <= self.num_nodes[rows])

    def drafts(
        self,
        # [num_rows]
        rows: torch.Tensor,
        # [num_rows]
        nodes: torch.Tensor,
    ):
        """The children [num_rows, MAX_CHILDREN] of nodes that have them, -1 past the last, the
        sampled child's slot [num_rows], and the law that they were drafted from."""
        slots = torch.arange(MAX_CHILDREN, device=rows.device)
        child_rows = (self.row_start[rows] + self.first_child[nodes]).unsqueeze(1) + slots
        children = self.node_tokens[child_rows.clamp_(max=self.node_tokens.shape[0] - 1)].long()
        children.masked_fill_(slots >= self.num_children[nodes].unsqueeze(1), -1)
        state = (self.req_idx[rows], self.internal_index[nodes])
        sample_slot = self.sample_slots[state].long()
        law = draft_law(
            self.draft_logits[state].to(torch.float32),
            self.draft_temperature[self.req_idx[rows]],
            children,
            sample_slot,
            rule=self.rule,
            sharpening=self.sharpening,
        )
        return children, sample_slot, law

    def draw(
        self,
        # [num_rows]
        rows: torch.Tensor,
        # broadcasts with [num_rows]
        nodes: torch.Tensor,
    ) -> torch.Tensor:
        """The uniform number that decides at each node. [num_rows]"""
        seeds, positions = self.seeds[self.req_idx[rows]], self.root_positions[rows]
        return rng.uniform(rng.row_key(seeds, positions, nodes, rng.ACCEPT))


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
    # [num_reqs, num_tree_nodes]
    visited: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`verification.verify_tree` on any device, without argument checks.

    Args:
        visited: bool, set where the outcome depends on a node's rows: a kernel may read no others.
            The rows are the target's, and above temperature 0 the draft's of a node with children.
    """
    if visited is None:
        shape = (len(row_start), len(first_child))
        visited = torch.empty(shape, dtype=torch.bool, device=target_logits.device)
    trees = _Trees(
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
        rule,
        sharpening,
        visited.zero_(),
    )
    num_reqs, device = row_start.shape[0], target_logits.device
    path = torch.full((num_reqs, max_depth + 1), -1, dtype=torch.int32, device=device)
    path[:, 0] = 0
    residual = _traverse(trees, path) if rule == "traversal" else _walk(trees, path)

    # [num_reqs, max_depth + 1]
    following = path.roll(-1, dims=1)
    following[:, -1] = -1
    tokens = node_tokens[row_start.unsqueeze(1) + following.clamp(min=0)].long()
    tokens.masked_fill_(following < 0, -1)
    num_accepted = (following >= 0).sum(dim=1)
    last_node = path.gather(1, num_accepted.unsqueeze(1)).squeeze(1)
    key = rng.row_key(seeds[req_idx], root_positions, last_node, rng.RESIDUAL)
    tokens.scatter_(1, num_accepted.unsqueeze(1), rng.draw(residual, key).unsqueeze(1))
    return tokens, num_accepted.to(torch.int32) + 1, path


def _walk(
    trees: _Trees,
    # [num_reqs, max_depth + 1], written: the accepted node of each depth after the root's
    path: torch.Tensor,
) -> torch.Tensor:
    """From the root to the first node that accepts no child. Returns what each request's last token
    is drawn from, unnormalised: [num_reqs, vocab_size]."""
    num_reqs, device = len(path), path.device
    residual = torch.empty(num_reqs, trees.target_logits.shape[1], device=device)
    node = torch.zeros(num_reqs, dtype=torch.int64, device=device)
    # Requests still walking. All of these lose the requests that stop.
    walking = torch.arange(num_reqs, device=device)
    for depth in range(path.shape[1]):
        at = node[walking]
        trees.visited[walking, at] = True
        probs, best, greedy = trees.target_probs(walking, at)
        residual[walking] = probs  # what a leaf emits from
        (kept,) = trees.has_children(walking, at).nonzero(as_tuple=True)
        if kept.numel() == 0:
            break
        walking, at, probs, best, greedy = (v[kept] for v in (walking, at, probs, best, greedy))
        children, sample_slot, law = trees.drafts(walking, at)
        outcome = node_outcome(probs, law, children, sample_slot, rule=trees.rule)
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
        child = trees.first_child[at[kept]] + slot
        node[walking] = child
        path[walking, depth + 1] = child.to(torch.int32)
    return residual


def _traverse(
    trees: _Trees,
    # [num_reqs, max_depth + 1], written: the accepted node of each depth after the root's
    path: torch.Tensor,
) -> torch.Tensor:
    """Depth first, each node after its children, until one is accepted.

    What a node is visited with depends on the tokens above it, not on what failed before it. So
    every node's chance is computed from the root down, and the first of the visiting order whose
    draw falls below it is accepted. Returns what each request's last token is drawn from,
    unnormalised: [num_reqs, vocab_size].
    """
    num_reqs, device = len(path), path.device
    first_child, num_children = trees.first_child.tolist(), trees.num_children.tolist()
    parents, sizes = [0] * len(first_child), trees.subtree_sizes.tolist()
    for node, (first, count) in enumerate(zip(first_child, num_children, strict=True)):
        parents[first : first + count] = [node] * count
    everyone = torch.arange(num_reqs, device=device)

    # [num_reqs, num_tree_nodes]: the path acceptance that a node is visited with; the probability
    # of accepting it once its children have failed; when its subtree's visit begins
    visit = torch.zeros(num_reqs, len(parents), device=device)
    visit[:, 0] = 1.0
    leave = torch.zeros_like(visit)
    start = torch.zeros(num_reqs, len(parents), dtype=torch.int64, device=device)
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

    nodes = torch.arange(len(parents), device=device)
    draws = trees.draw(everyone.unsqueeze(1), nodes)
    finish = start + torch.tensor(sizes, device=device)
    accepted = finish.masked_fill(draws >= leave, len(parents) + 1).argmin(dim=1)
    # A leaf is visited with a chance that its parent gave, and read only to emit from it.
    read = (visit > 0) & trees.has_children(everyone.unsqueeze(1), nodes)
    read &= start < finish.gather(1, accepted.unsqueeze(1))
    trees.visited.copy_(read | (nodes == accepted.unsqueeze(1)))

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
    children, sample_slot, law = trees.drafts(rows, nodes)
    outcome = traversal_outcome(probs, law, children, sample_slot, path_acceptance, ordered=ordered)
    # A greedy target accepts the child that holds its best token, whatever the draft.
    match = (children == best).to(torch.float32)
    outcome = outcome._replace(
        visit=torch.where(greedy, match, outcome.visit),
        leave=torch.where(greedy.squeeze(1), path_acceptance, outcome.leave),
    )
    return sample_slot, outcome
