# SPDX-License-Identifier: Apache-2.0
"""Drafts travel with their trees, and without them to the workers."""

import pickle

import pytest

from vllm_spechub.integration.messages import ScheduledDrafts
from vllm_spechub.trees.level_tree import LevelTree
from vllm_spechub.trees.tree import TokenTree

TREES = (TokenTree.parse("binary:2"), TokenTree.parse("chain:2"))


def test_each_request_has_the_tree_that_it_drafted():
    drafts = ScheduledDrafts({"a": [1, 2], "b": [3]}, TREES, {"a": 1, "b": 0, "c": None})
    assert drafts == {"a": [1, 2], "b": [3]}
    assert drafts.trees() == {"a": TREES[1], "b": TREES[0]}
    assert ScheduledDrafts.checked(drafts) is drafts


def test_workers_get_a_plain_dictionary():
    drafts = ScheduledDrafts({"a": [1, 2]}, TREES, {"a": 1})
    received = pickle.loads(pickle.dumps(drafts))
    assert type(received) is dict
    assert received == {"a": [1, 2]}


def test_drafts_without_trees_are_refused():
    assert ScheduledDrafts.checked({}).trees() == {}
    with pytest.raises(TypeError, match="drafts without their trees"):
        ScheduledDrafts.checked({"a": [1]})
    with pytest.raises(ValueError, match="request a has drafts, but drafted no tree"):
        ScheduledDrafts({"a": [1]}, TREES, {"a": None}).trees()


def test_trees_that_workers_decide_come_with_the_drafts():
    """A request whose drafts are not known yet has no tree, and another's is never taken."""
    drafted: dict[str, TokenTree] = {}
    trees, tree_index = (LevelTree((2, 2)), TREES[1]), {"a": 0, "b": 0, "c": 1}
    drafts = ScheduledDrafts(
        {"a": [1, 2, 3, 4], "b": [-1] * 4, "c": [5, 6]}, trees, tree_index, drafted
    )
    with pytest.raises(ValueError, match="request a has drafts of an unknown tree"):
        drafts.trees()
    drafted["a"] = TokenTree((0, 0, 2, 2))
    assert drafts.trees() == {"a": drafted["a"], "c": TREES[1]}
