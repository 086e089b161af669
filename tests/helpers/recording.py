# SPDX-License-Identifier: Apache-2.0
"""Records the rows that engines of this process verify."""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch


@dataclass
class Node:
    """One verified row of one step."""

    req_id: str
    root_position: int
    path_tokens: tuple[int, ...]  # drafted tokens from the root's child down to this node
    logits: torch.Tensor
    processed: torch.Tensor
    temperature: float  # by which the processed row is still to be divided


@contextmanager
def recorded_nodes():
    """A list that receives every row that is verified within the block."""
    from vllm_spechub.engine.sampler import TreeRejectionSampler

    nodes: list[Node] = []
    process = TreeRejectionSampler.process

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
                remaining = float(part.temperature[batch.idx_mapping[r]])
                for node in range(end - start if end - start > 1 else 0):
                    path = tuple(tokens[i] for i in trees[r].paths[node][1:])
                    row = part.logits[first_row + node].clone()
                    id_ = batch.req_ids[r]
                    nodes.append(Node(id_, root, path, raw[start + node], row, remaining))
            yield part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TreeRejectionSampler, "process", spy)
        yield nodes


def request_of(req_id: str) -> str:
    """A request's id without the random suffix that vLLM appends to it inside the engine."""
    return req_id.rpartition("-")[0]
