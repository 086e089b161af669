# SPDX-License-Identifier: Apache-2.0
"""`RootFed`: what draws a draft from a cache that the target's own step keeps true."""

from collections.abc import Iterator

import numpy as np
import torch
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_spechub.proposers.base import DraftStep
from vllm_spechub.proposers.model_proposer import ModelProposer
from vllm_spechub.trees.tree import Tree


class RootFed(ModelProposer[torch.Tensor]):
    """A network that reads nothing but the new roots, and then the nodes."""

    def may_pause(self, batch: InputBatch) -> bool:
        """Always: the cache is up to date, whatever is drafted."""
        return True

    def rows_of(self, tree: Tree) -> Iterator[int]:
        """The root's one row is that of `read`."""
        yield from map(len, tree.internal_levels())

    def read(self, step: DraftStep) -> torch.Tensor:
        """Feed the roots. Returns their hidden states, [num_reqs, hidden_size]."""
        rows = self.fed_rows(np.ones(step.num_reqs, dtype=np.int64))
        return self.feed(step, rows, step.root_positions)
