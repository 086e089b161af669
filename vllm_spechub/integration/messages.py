# SPDX-License-Identifier: Apache-2.0
"""What travels with vLLM's own messages between the scheduler, the grammar and the workers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from vllm_spechub.trees.tree import TokenTree, Tree

NONE_DRAFTED: Mapping[str, TokenTree] = MappingProxyType({})


class ScheduledDrafts(dict[str, list[int]]):
    """The drafts of one step, which vLLM calls `scheduled_spec_decode_tokens`, with their trees.

    The scheduler puts one in the place of vLLM's dictionary in every step. The workers, which keep
    records of their own, receive a plain dictionary.

    Args:
        drafts: the drafted tokens of each request that has a tree in this step.
        trees: the schedule's trees.
        drafted: by request, what it has made of a `LevelTree` that it drafted last, as far as the
            workers have said.
        tree_index: for every scheduled request, the place in `trees` of the tree that it drafted
            last; None if it drafted none in its last step.
    """

    def __init__(
        self,
        drafts: Mapping[str, list[int]],
        trees: tuple[Tree, ...],
        tree_index: dict[str, int | None],
        drafted: Mapping[str, TokenTree] = NONE_DRAFTED,
    ) -> None:
        super().__init__(drafts)
        self._trees = trees
        self._drafted = drafted
        self.tree_index = tree_index

    @classmethod
    def checked(cls, drafts: dict[str, list[int]]) -> "ScheduledDrafts":
        """Check that a step's drafts come with their trees, which no drafts do without.

        Raises:
            TypeError: there are drafts, but our scheduler did not schedule them.
        """
        if isinstance(drafts, cls):
            return drafts
        if drafts:
            raise TypeError(
                "scheduled_spec_decode_tokens has drafts without their trees; with spechub, only "
                "its own scheduler can schedule drafts"
            )
        return cls({}, (), {})

    def drafted_index(self, request_id: str) -> int:
        """The place in the schedule of the tree that a request's drafts belong to.

        Raises:
            ValueError: the request drafted no tree.
        """
        index = self.tree_index[request_id]
        if index is None:
            raise ValueError(f"request {request_id} has drafts, but drafted no tree")
        return index

    def trees(self) -> dict[str, TokenTree]:
        """The tree of each request that has drafts. Missing are those whose drafts are not known
        here, if the workers have decided the tree.

        Raises:
            ValueError: drafts are known, but not the tree that their workers have decided.
        """
        trees = {}
        for request_id, tokens in self.items():
            tree = self._trees[self.drafted_index(request_id)]
            if isinstance(tree, TokenTree):
                trees[request_id] = tree
            elif request_id in self._drafted:
                trees[request_id] = self._drafted[request_id]
            elif any(token >= 0 for token in tokens):
                raise ValueError(f"request {request_id} has drafts of an unknown tree")
        return trees

    def __reduce__(self) -> tuple[type[dict], tuple[dict[str, list[int]]]]:
        return dict, (dict(self),)


@dataclass
class TreeRunnerOutput(ModelRunnerOutput):
    """A worker's output in a step that verified trees."""

    # [num_reqs, depth + 1] int32, the accepted node of each depth, 0 first; -1 past the end, and
    # everywhere if the request had lost its draft
    accepted_paths: np.ndarray = field(kw_only=True)
    # [num_reqs, depth] int32, each accepted node's place among its siblings; None if all trees are
    # static
    accepted_slots: np.ndarray | None = field(kw_only=True)


@dataclass
class TreeDraftTokenIds(DraftTokenIds):
    """A worker's drafts, with the trees that it has decided."""

    # [num_reqs, num_nodes + 1], each node's parent, the root's 0
    parents: list[list[int]]
