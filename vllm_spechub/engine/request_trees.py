# SPDX-License-Identifier: Apache-2.0
"""`RequestTrees`: everything that a worker remembers of its requests' drafts."""

import numpy as np
import torch
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_spechub.trees.schedule import TreeSchedule
from vllm_spechub.trees.tree import Tree


class RequestTrees:
    """Which tree each request drafted last, how far its draft lags, and which path was accepted.

    A schedule may change the tree from step to step, and a request that missed a step still has the
    tree of its last one, so a batch may mix trees.

    Args:
        schedule: the trees that requests may draft.
        max_num_reqs: request-state slots.
        device: where verification and drafting run.
    """

    def __init__(self, schedule: TreeSchedule, max_num_reqs: int, device: torch.device) -> None:
        self.trees = schedule.trees
        # [num_trees]
        self._depths = np.array([tree.depth for tree in schedule.trees])
        # [max_num_reqs] place in `trees`
        self._index = np.zeros(max_num_reqs, dtype=np.int64)
        # By tree, [most_requests] whose draft each row holds, -1 for nobody's. None if a request's
        # row is that of its state.
        most_requests = schedule.most_requests(max_num_reqs).values()
        self._owners = [
            np.full(most, -1) if most < max_num_reqs else None for most in most_requests
        ]
        # by tree, the rows that there are for drafts, of which the last is nobody's
        self.num_draft_rows = [most + 1 for most in most_requests]
        # [max_num_reqs] the row of the request's draft; -1 if it has none, or lost it
        self._draft_row = np.full(max_num_reqs, -1)
        # [max_num_reqs] upper bound on the tokens before the next one that the draft has not read
        self._draft_lag = np.zeros(max_num_reqs, dtype=np.int64)
        # [max_num_reqs] the first position that the draft has not read, at most the last root's
        self._next_unread_position = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        # [num_reqs, depth + 1] int32, of the batch that was verified last
        self._accepted_paths: torch.Tensor | None = None

    def add_request(self, req_index: int) -> None:
        """Begin a request, in the place of one that has ended."""
        self._draft_lag[req_index] = 0
        self._release(np.array([req_index]))

    def record_drafted(
        self,
        # [num_reqs]
        reqs: np.ndarray,
        index: int,
    ) -> None:
        """Record that these requests draft the tree with this place in the schedule, and give each
        of them a row for its draft.

        A request that missed steps keeps its draft, and so the rows may be used up. Then others
        lose theirs, and have no tree in their next step.
        """
        self._release(reqs)
        self._index[reqs] = index
        owners = self._owners[index]
        if owners is None:
            self._draft_row[reqs] = reqs
            return
        rows = np.argsort(owners, kind="stable")[: len(reqs)]  # nobody's first
        self._draft_row[owners[rows][owners[rows] >= 0]] = -1
        owners[rows] = reqs[: len(rows)]
        self._draft_row[reqs[: len(rows)]] = rows

    def _release(
        self,
        # [num_reqs]
        reqs: np.ndarray,
    ) -> None:
        for index, owners in enumerate(self._owners):
            if owners is not None:
                owned = self._draft_row[reqs[self._index[reqs] == index]]
                owners[owned[owned >= 0]] = -1
        self._draft_row[reqs] = -1

    def draft_rows_for(
        self,
        # [num_reqs]
        reqs: np.ndarray,
    ) -> np.ndarray:
        """The row of each request's draft among those of its tree; -1 if it has none. [num_reqs]
        int64"""
        return self._draft_row[reqs]

    def index_for(
        self,
        # [num_reqs]
        reqs: np.ndarray,
    ) -> np.ndarray:
        """The place in the schedule of each request's tree. [num_reqs] int64"""
        return self._index[reqs]

    def trees_for(
        self,
        # [num_reqs]
        reqs: np.ndarray,
    ) -> list[Tree]:
        """Each request's tree."""
        return [self.trees[index] for index in self._index[reqs]]

    def depths_for(
        self,
        # [num_reqs]
        reqs: np.ndarray,
    ) -> np.ndarray:
        """The depth of each request's tree. [num_reqs] int64"""
        return self._depths[self._index[reqs]]

    def record_accepted(
        self,
        # [num_reqs, depth + 1] int32, the accepted node of each depth, 0 first; -1 past the end
        paths: torch.Tensor,
    ) -> None:
        """Record the paths that the batch's trees were just accepted along."""
        self._accepted_paths = paths

    def accepted_paths(self, batch: InputBatch) -> torch.Tensor | None:
        """The accepted path of each request of the batch that was just verified.

        Returns:
            [num_reqs, depth + 1] int32: the accepted node of each depth, 0 first, -1 past the end.
            None if no request of the batch had a tree.
        """
        return self._accepted_paths if batch.num_draft_tokens else None

    def draft_lag(
        self,
        # [num_reqs]
        reqs: np.ndarray,
    ) -> np.ndarray:
        """The number of each request's tokens that the draft has not read, at most. [num_reqs]
        int64"""
        return self._draft_lag[reqs]

    def next_unread_position(
        self,
        # [num_reqs] int64
        idx_mapping: torch.Tensor,
    ) -> torch.Tensor:
        """The first position that the draft has not read, if the request lags. [num_reqs] int64"""
        return self._next_unread_position[idx_mapping]

    def pause_reading(
        self,
        # [num_reqs]
        reqs: np.ndarray,
    ) -> None:
        """Record that the draft leaves out the token that each of these requests has just got."""
        self._draft_lag[reqs] += 1

    def catch_up(
        self,
        # [num_reqs]
        reqs: np.ndarray,
        num_rows: int,
    ) -> np.ndarray:
        """Give spare rows to requests that lag, one after the other, and record that they catch up.

        Args:
            reqs: the requests of the batch.
            num_rows: how many rows there are to give.

        Returns:
            The number of rows that each request gets. [num_reqs] int64
        """
        lag = self._draft_lag[reqs]
        given = np.clip(num_rows - (np.cumsum(lag) - lag), 0, lag)
        self._draft_lag[reqs] = lag - given
        return given

    def record_read(
        self,
        # [num_reqs] int64
        idx_mapping: torch.Tensor,
        # [num_reqs] int64
        positions: torch.Tensor,
    ) -> None:
        """Record that the draft has read everything before these positions."""
        self._next_unread_position[idx_mapping] = positions
