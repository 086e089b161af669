# SPDX-License-Identifier: Apache-2.0
"""Records the rows that engines of this process verify."""

from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from vllm_spechub.rules.grown_trees import static_tree
from vllm_spechub.trees.tree import TokenTree, Tree


@dataclass
class Node:
    """One verified row of one step."""

    req_id: str
    root_position: int
    path_tokens: tuple[int, ...]  # drafted tokens from the root's child down to this node
    logits: torch.Tensor
    processed: torch.Tensor
    temperature: float  # by which the processed row is still to be divided
    draft_logits: torch.Tensor | None  # of the draft at this node, None at a leaf
    tree: TokenTree  # of its request in this step


@contextmanager
def recorded_nodes():
    """A list that receives every row that is verified within the block."""
    from vllm_spechub.engine.sampler import TreeRejectionSampler
    from vllm_spechub.rules.kernel_rule import KernelRule

    nodes: list[Node] = []
    # by tree, row of the request's draft, and row of the node among its own
    drafts: dict[tuple[Tree, int, int], torch.Tensor] = {}
    sample, process = KernelRule.sample_children, TreeRejectionSampler.process

    def keep_drafts(self, logits, level, requests, state):
        rows = level.rows(len(requests.req_idx))
        owners = requests.req_idx[rows.req].tolist()
        for row, owner, inner in zip(logits, owners, rows.internal.tolist(), strict=True):
            drafts[state.tree, owner, inner] = row.clone()
        sample(self, logits, level, requests, state)

    def spy(self, logits, batch):
        raw = logits.clone()
        trees = self.request_trees.trees_for(batch.idx_mapping_np)
        for part in process(self, logits, batch):
            everyone = range(batch.num_reqs)
            places = everyone if part.places_np is None else part.places_np.tolist()
            for r, first_row in zip(places, part.row_start.tolist(), strict=True):
                start, end = batch.cu_num_logits_np[r : r + 2]
                rows = batch.logits_indices[start:end]
                tokens, root = batch.input_ids[rows].tolist(), int(batch.positions[rows[0]])
                req, tree = int(batch.idx_mapping[r]), trees[r]
                own = int(self.request_trees.draft_rows_for(np.array([req]))[0])
                grown = self.layout.nodes._grown[int(self.request_trees.index_for(req))]
                static = tree if grown is None else static_tree(grown, max(own, 0))
                assert isinstance(static, TokenTree)
                remaining = float(part.temperature[req])
                # a tree below a prompt's token is a placeholder that nobody drafted
                drafted = root >= int(self.sampler.req_states.prefill_len.gpu[req])
                for node in range(end - start if end - start > 1 else 0):
                    path = tuple(tokens[i] for i in static.paths[node][1:])
                    row = part.logits[first_row + node].clone()
                    inner = int(tree.internal_index[node])
                    draft_row = None
                    if drafted and inner >= 0:
                        draft_row = drafts.get((tree, own, inner))
                    nodes.append(
                        Node(
                            batch.req_ids[r],
                            root,
                            path,
                            raw[start + node],
                            row,
                            remaining,
                            draft_row,
                            static,
                        )
                    )
            yield part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TreeRejectionSampler, "process", spy)
        patch.setattr(KernelRule, "sample_children", keep_drafts)
        yield nodes


def request_of(req_id: str) -> str:
    """A request's id without the random suffix that vLLM appends to it inside the engine."""
    return req_id.rpartition("-")[0]
