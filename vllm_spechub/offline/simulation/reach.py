# SPDX-License-Identifier: Apache-2.0
"""From drafted trees to the probability that each node is accepted.

A rule's `reach` computes it for given trees, so verification's own noise is averaged out: what is
left is the choice of roots and the draft's own draws.
"""

import torch

from vllm_spechub.offline.simulation.drafts import DraftedPlans, NodeKind, Plan
from vllm_spechub.rules.draft_state import DraftState
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
    for index, node in enumerate(tree.internal_nodes.tolist()):
        count, first = int(tree.num_children[node]), int(tree.first_child[node])
        children = drafted.children[NodeKind(plan.variant, count)]
        rows = children.rows(nodes[:, index])
        tokens[:, first - 1 : first - 1 + count] = children.tokens[rows]
        sampled[:, index] = children.sampled[rows]
    state = DraftState(tree, tokens, Drafts(drafted.draft_logits[nodes], sampled))

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
