# SPDX-License-Identifier: Apache-2.0
"""Which tree is drafted for how many running requests, and every schedule that is refused."""

import pytest

from vllm_spechub.trees.schedule import TreeSchedule
from vllm_spechub.trees.tree import TokenTree


def test_a_schedule():
    spec = [[1, 8, "chain:2"], [9, 9, "binary:3"], [10, 20, "chain:2"], [21, None, None]]
    schedule = TreeSchedule.parse(spec, "ordered")
    assert schedule.trees == (TokenTree.parse("binary:3"), TokenTree.parse("chain:2"))
    assert schedule.depth == 3
    assert schedule.max_children == 2
    assert [schedule.index(n) for n in (14, 2, 0)] == [0, 1, None]
    assert [str(batch) for batch in schedule.ranges] == ["1 to 8", "9", "10 to 20", "21 or more"]
    by_size = schedule.nodes_by_batch_size()
    assert by_size[:3] == [(1, 8, 2), (9, 9, 14), (10, 20, 2)]
    assert by_size[3][0] == 21
    assert by_size[3][2] == 0


def test_a_constant_schedule():
    tree = TokenTree.parse("kary:3:2")
    assert TreeSchedule.parse([[1, None, "kary:3:2"]], "ordered") == TreeSchedule.constant(tree)
    assert TreeSchedule.constant(tree).nodes_by_batch_size() is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("auto:7", "the schedule is 'auto:7', allowed: [[FIRST, LAST, TREE], ...] or 'auto'"),
        ([], "the last range must have null as its end, to also cover 1 and more requests"),
        ([[1, 8]], "range 1 is [1, 8], allowed: [FIRST, LAST, TREE]"),
        (["1, 8"], "range 1 is '1, 8', allowed: [FIRST, LAST, TREE]"),
        ([[1, None, "chain:2", 3]], "range 1 is [1, None, 'chain:2', 3], allowed: [FIRST, LAST"),
        ([["1", None, "chain:2"]], "range 1: FIRST is '1', allowed: a number"),
        ([[1, 2.0, "chain:2"]], "range 1: LAST is 2.0, allowed: a number or null"),
        ([[None, 2, "chain:2"]], "range 1: FIRST is None, allowed: a number"),
        ([[1, True, "chain:2"]], "range 1: LAST is True, allowed: a number or null"),
        ([[2, None, "chain:2"]], "range 1 starts at 2, it must start at 1"),
        ([[1, 8, "chain:2"], [8, None, None]], "range 2 starts at 8, it must start at 9"),
        ([[1, 8, "chain:2"], [10, None, None]], "range 2 starts at 10, it must start at 9"),
        ([[1, None, "chain:2"], [9, None, None]], "range 1 has no end, only the last range"),
        ([[1, 0, "chain:2"], [1, None, None]], "range 1 ends at 0, before it starts at 1"),
        ([[1, 8, "chain:2"]], "null as its end, to also cover 9 and more requests"),
        ([[1, None, None]], "no range has a tree"),
        ([[1, 4, "binary:2"], [5, None, "chain:6"]], "two different trees have 6 nodes"),
        ([[1, None, "oak"]], "range 1: TREE: 'oak' is not a tree, allowed: binary:DEPTH"),
        ([[1, None, 3]], "range 1: TREE: 3 is not a tree, allowed: binary:DEPTH"),
        (None, "the schedule is None, allowed: [[FIRST"),
    ],
)
def test_refused(spec, message):
    with pytest.raises(ValueError) as error:
        TreeSchedule.parse(spec, "ordered")
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_the_most_requests_that_draft_each_tree():
    ranges = [[1, 2, "binary:3"], [3, 8, "chain:2"], [9, 9, "binary:3"], [10, None, "chain:1"]]
    schedule = TreeSchedule.parse(ranges, "ordered")
    most = {str(tree): reqs for tree, reqs in schedule.most_requests(64).items()}
    assert most == {"binary:3": 9, "chain:2": 8, "chain:1": 64}
    most = {str(tree): reqs for tree, reqs in schedule.most_requests(6).items()}
    assert most == {"binary:3": 2, "chain:2": 6, "chain:1": 0}
