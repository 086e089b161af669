# SPDX-License-Identifier: Apache-2.0
"""`NodeTables`: what is known of every node of every tree that a batch may hold, on the device.

A static tree has one entry for each of its nodes. Of a `LevelTree` each row of drafts has a tree of
its own, and an entry for each of its nodes.
"""

from typing import Literal

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_spechub.engine.request_trees import RequestTrees
from vllm_spechub.rules.draft_state import DraftBuffers
from vllm_spechub.trees.level_tree import LevelTree
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels.arguments import GrownTrees

Name = Literal["parents", "first_child", "ancestor_masks"]
NAMES: tuple[Name, ...] = ("parents", "first_child", "ancestor_masks")


def _of_static(tree: TokenTree, name: Name) -> np.ndarray:
    if name == "parents":
        return np.array([0, *tree.parents], dtype=np.int32)
    return tree.first_child if name == "first_child" else tree.ancestor_masks


class NodeTables:
    """Tables with an entry for each node. Entry 0 stands for an ordinary token.

    Args:
        request_trees: the trees, and which one a request has drafted.
        device: where the tables live.
    """

    def __init__(self, request_trees: RequestTrees, device: torch.device) -> None:
        self.request_trees = request_trees
        self.device = device
        trees, copies = request_trees.trees, request_trees.num_draft_rows
        self.decides = [isinstance(tree, LevelTree) for tree in trees]
        # [num_trees] how many trees of each there may be, the entries of one, and the first root's
        self.copies = np.where(self.decides, copies, 1)
        self._sizes = np.array([tree.num_nodes + 1 for tree in trees])
        self._first = 1 + np.cumsum([0, *(self._sizes * self.copies)[:-1]])
        # by tree, what its requests have made of it
        self._grown: list[GrownTrees | None] = [None] * len(trees)
        self.place_tables()

    def place_tables(self) -> None:
        """Copy the static trees' tables to the device, again after sleep mode has discarded
        them."""
        self._pieces: dict[Name, list[torch.Tensor]] = {}
        for name in NAMES:
            dtype = np.int64 if name == "ancestor_masks" else np.int32
            tables = [
                _of_static(tree, name) if isinstance(tree, TokenTree) else np.empty(0, dtype)
                for tree in self.request_trees.trees
            ]
            pieces = [np.zeros(1, dtype), *tables]
            if not any(self.decides):  # one gather for all
                pieces = [np.concatenate(pieces)]
            self._pieces[name] = [
                torch.from_numpy(piece).to(self.device, copy=True) for piece in pieces
            ]

    def bind(self, drafts: DraftBuffers) -> None:
        """Take the trees that requests draft."""
        self._grown = [state.grown for state in drafts.states]

    def flat(self, name: Name) -> torch.Tensor:
        """A table of all entries. [num_entries] int32, ancestor masks int64"""
        ordinary, *pieces = self._pieces[name]
        if not pieces:
            return ordinary
        for index, grown in enumerate(self._grown):
            if self.decides[index]:
                assert grown is not None  # the proposer has been bound
                table = (
                    grown.ancestor_masks
                    if name == "ancestor_masks"
                    else getattr(grown.tables, name)
                )
                pieces[index] = table.flatten()
        return torch.cat([ordinary, *pieces])

    def root_entries(
        self,
        # [num_reqs]
        reqs: np.ndarray,
    ) -> np.ndarray:
        """The entry of each request's root, with those of its nodes after it. [num_reqs] int64"""
        index = self.request_trees.index_for(reqs)
        # one without a draft has any tree's
        copy = self.request_trees.draft_rows_for(reqs).clip(min=0) * (self.copies > 1)[index]
        return self._first[index] + copy * self._sizes[index]

    def ancestors(
        self,
        # [num_rows] the entry of each row's root
        roots: torch.Tensor,
        # [num_rows] int64
        nodes: torch.Tensor,
        # [num_rows] how many levels to go up
        steps: torch.Tensor,
        most_steps: int,
    ) -> torch.Tensor:
        """The nodes so many levels above nodes. [num_rows] int64"""
        parents = self.flat("parents")
        for taken in range(most_steps):
            nodes = torch.where(steps > taken, parents[roots + nodes].long(), nodes)
        return nodes

    def slots(
        self,
        # [num_reqs]
        reqs: np.ndarray,
        # [num_reqs, depth + 1] int32, 0 first; -1 past the end
        paths: torch.Tensor,
    ) -> torch.Tensor:
        """The place of each node of a path among its siblings. [num_reqs, depth] int32, garbage
        past the end"""
        roots = async_tensor_h2d(self.root_entries(reqs), device=self.device)
        above = roots.unsqueeze(1) + paths[:, :-1].clamp(min=0)
        return paths[:, 1:] - self.flat("first_child")[above]
