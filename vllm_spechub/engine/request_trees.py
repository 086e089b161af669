# SPDX-License-Identifier: Apache-2.0
"""`DraftedTrees`: what the worker remembers on the host of each request's drafts."""

import numpy as np

from vllm_spechub.trees.schedule import TreeSchedule
from vllm_spechub.trees.tree import TokenTree


class DraftedTrees:
    """Which tree each request drafted last, and how far the draft model lags behind it.

    The width may change from step to step, and a request that missed a step still has the tree of
    its last one: a batch may mix trees.
    """

    def __init__(self, schedule: TreeSchedule, max_num_reqs: int) -> None:
        self.trees = schedule.trees
        # [num_trees]
        self.depths = np.array([tree.depth for tree in schedule.trees])
        # [max_num_reqs] place in `trees`
        self.index = np.zeros(max_num_reqs, dtype=np.int64)
        # [max_num_reqs] at most so many tokens before a request's next one the draft has not read
        self.behind = np.zeros(max_num_reqs, dtype=np.int64)

    def add_request(self, req_idx: int) -> None:
        self.behind[req_idx] = 0

    def of(
        self,
        # [num_reqs]
        reqs: np.ndarray,
    ) -> list[TokenTree]:
        """Each request's tree."""
        return [self.trees[index] for index in self.index[reqs]]
