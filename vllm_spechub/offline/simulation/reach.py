# SPDX-License-Identifier: Apache-2.0
"""From drafted trees to the probability that each node is accepted.

A rule's `reach` computes it for given trees, so verification's own noise is averaged out: what is
left is the choice of roots and the draft's own draws.
"""

import torch

from vllm_spechub.offline.simulation.drafts import DraftedPlans, NodeKind, Plan
from vllm_spechub.rules.draft_state import DraftState
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels.arguments import Drafts, Requests, TargetRows


@torch.inference_mode()
def reach(drafted: DraftedPlans, plan: Plan) -> torch.Tensor:
    """The probability that each node is on the accepted path, given the drafted tree.

    Returns:
        float32 [num_roots, num_nodes + 1], 1 for the root. Its sum over a row is the expected
        number of tokens that the step emits, the bonus token included.
    """
    tree, nodes = plan.tree, drafted.nodes[plan]
    num_roots, device = len(nodes), nodes.device
    tokens = torch.zeros(num_roots, tree.num_nodes, dtype=torch.int64, device=device)
    sampled = torch.zeros(nodes.shape, dtype=torch.int32, device=device)
    grown = drafted.grown.get(plan)
    for index, node in enumerate(tree.internal_nodes.tolist()):
        if isinstance(tree, TokenTree):
            counts = torch.full((num_roots,), int(tree.num_children[node]), device=device)
            first_child = torch.full_like(counts, int(tree.first_child[node]))
        else:
            assert grown is not None
            counts, first_child = (
                table[:, node] for table in (grown.tables.num_children, grown.tables.first_child)
            )
        for count in range(1, int(counts.max()) + 1):
            (roots,) = (counts == count).nonzero(as_tuple=True)
            if len(roots) == 0:
                continue
            children = drafted.children[NodeKind(plan.variant, count)]
            rows = children.rows(nodes[roots, index])
            columns = first_child[roots].unsqueeze(1) - 1 + torch.arange(count, device=device)
            tokens[roots.unsqueeze(1), columns] = children.tokens[rows]
            sampled[roots, index] = children.sampled[rows]
    drafts = Drafts(drafted.draft_logits[nodes], sampled)
    state = DraftState(tree, tokens, drafts, grown=grown)

    num_rows = tree.num_nodes + 1
    # What the target says at leaves decides the bonus token only.
    rows = drafted.target_logits.new_zeros(num_roots, num_rows, drafted.target_logits.shape[1])
    rows[:, tree.internal_nodes] = drafted.target_logits[nodes]
    everyone = torch.arange(num_roots, device=device)
    temperature = torch.full((num_roots,), float(drafted.temperature), device=device)
    target = TargetRows(
        rows.flatten(0, 1),
        temperature,
        (everyone * num_rows).to(torch.int32),
        torch.full_like(everyone, tree.num_nodes, dtype=torch.int32),
        torch.nn.functional.pad(tokens, (1, 0)).flatten(),
    )
    requests = Requests(everyone, torch.zeros_like(everyone), temperature, everyone)
    return plan.variant.verification.reach(target, requests, state)
