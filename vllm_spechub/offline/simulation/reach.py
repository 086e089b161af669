# SPDX-License-Identifier: Apache-2.0
"""From drafted trees to the probability that each node is accepted.

Given a tree, verification's coin tosses have closed forms, so none is tossed: what is left of the
noise is the choice of roots and the draft's own draws.
"""

import torch

from vllm_spechub.offline.simulation.drafts import CHUNK, Children, Drafts, Law, Plan
from vllm_spechub.triton_kernels.verification.node_rules import (
    draft_law,
    node_outcome,
    traversal_outcome,
)


class Reach:
    """Acceptance of the plans' nodes; what plans share is computed once."""

    def __init__(self, drafts: Drafts) -> None:
        self._drafts = drafts
        # [num_rows, num_children] by law, for the rules that walk from the root
        self._accept: dict[Law, torch.Tensor] = {}

    @torch.inference_mode()
    def of(self, plan: Plan) -> torch.Tensor:
        """The probability that each node is on the accepted path, given the drafted tree.

        Returns:
            float32 [num_roots, num_nodes + 1], 1 for the root. Its sum over a row is the expected
            number of tokens that the step emits, the bonus token included.
        """
        if plan.variant.rule == "traversal" and self._drafts.temperature > 0:
            return self._leaf_to_root(plan)
        tree, nodes = plan.tree, self._drafts.nodes[plan]
        reach = torch.ones(len(nodes), tree.num_nodes + 1, device=nodes.device)
        for node, numbers in zip(tree.internal_nodes.tolist(), nodes.unbind(dim=1), strict=True):
            law = Law(plan.variant, int(tree.num_children[node]))
            accept = self._accepted(law)[self._drafts.children[law].rows(numbers)]
            first = int(tree.first_child[node])
            reach[:, first : first + law.num_children] = reach[:, node : node + 1] * accept
        return reach

    def _accepted(self, law: Law) -> torch.Tensor:
        if law not in self._accept:
            children = self._drafts.children[law]
            if self._drafts.temperature == 0:  # every rule accepts the target's best token
                best = self._drafts.target_probs[children.nodes].argmax(dim=1, keepdim=True)
                self._accept[law] = (children.tokens == best).float()
                return self._accept[law]
            rows = torch.arange(len(children.nodes), device=children.nodes.device)
            self._accept[law] = torch.cat(
                [
                    node_outcome(*self._at(children, chunk, law), rule=law.variant.rule).accept
                    for chunk in rows.split(max(1, CHUNK // self._drafts.draft_logits.shape[1]))
                ]
            )
        return self._accept[law]

    def _at(
        self,
        children: Children,
        # [num_rows]
        rows: torch.Tensor,
        law: Law,
    ) -> tuple:
        """The target's distribution, the draft law, the children and the sampled child's slot."""
        nodes, tokens = children.nodes[rows], children.tokens[rows]
        sample_slot = children.sample_slot[rows]
        temperature = torch.full((len(rows),), self._drafts.temperature, device=rows.device)
        drafted = draft_law(
            self._drafts.draft_logits[nodes],
            temperature,
            tokens,
            sample_slot,
            rule=law.variant.rule,
            sharpening=law.variant.sharpening,
        )
        return self._drafts.target_probs[nodes], drafted, tokens, sample_slot

    def _leaf_to_root(self, plan: Plan) -> torch.Tensor:
        tree, nodes = plan.tree, self._drafts.nodes[plan]
        num_roots, device = len(nodes), nodes.device
        sizes = torch.from_numpy(tree.subtree_sizes).to(device)
        # What a node is visited with, the probability of accepting it once its children have
        # failed, and its place in the order of visits.
        visit = torch.ones(num_roots, tree.num_nodes + 1, device=device)
        leave = torch.zeros_like(visit)
        start = torch.zeros(num_roots, tree.num_nodes + 1, dtype=torch.int64, device=device)
        for node in range(tree.num_nodes + 1):
            count = int(tree.num_children[node])
            if count == 0:
                leave[:, node] = visit[:, node]
                continue
            law = Law(plan.variant, count)
            children = self._drafts.children[law]
            rows = children.rows(nodes[:, tree.internal_index[node]])
            at = self._at(children, rows, law)
            below = slice(int(tree.first_child[node]), int(tree.first_child[node]) + count)
            ordered = len(set(sizes[below].tolist())) > 1  # as `verify_tree` has it
            outcome = traversal_outcome(*at, visit[:, node], ordered=ordered)
            visit[:, below], leave[:, node] = outcome.visit, outcome.leave
            # The sampled child's subtree is visited first, the others by slot.
            is_sample = torch.arange(count, device=device) == at[-1].unsqueeze(1)
            size = sizes[below]
            before = (size * ~is_sample).cumsum(dim=1) - size + size[at[-1]].unsqueeze(1)
            start[:, below] = start[:, node : node + 1] + before.masked_fill(is_sample, 0)
        # A node is left after its subtree; it is accepted if all that was left before it failed.
        order = (start + sizes).argsort(dim=1)
        in_order = leave.gather(1, order)
        failed = (1 - in_order).cumprod(dim=1).roll(1, dims=1)
        failed[:, 0] = 1.0
        ends = torch.zeros_like(leave).scatter_(1, order, failed * in_order)
        # On the accepted path: it ends here or below.
        for node in range(tree.num_nodes, 0, -1):
            ends[:, tree.parents[node - 1]] += ends[:, node]
        return ends
