# SPDX-License-Identifier: Apache-2.0
"""`match` without an engine: which drawn tokens are accepted, in whole and in cut trees."""

import pytest
import torch

from vllm_spechub import TokenTree
from vllm_spechub.rules.draft_state import DraftState
from vllm_spechub.rules.kernel_rule import PORTABLE_KERNELS
from vllm_spechub.rules.match_rule import MatchRule
from vllm_spechub.triton_kernels.arguments import Requests, TargetRows

TREE = TokenTree((0, 0, 1, 1, 2))


def verified(num_nodes: list[int], node_tokens: list[int], drawn: list[int]):
    """Emitted tokens and paths of requests whose rows stand one after the other."""
    num_reqs = len(num_nodes)
    starts = [sum(num_nodes[:r]) + r for r in range(num_reqs)]
    state = DraftState.empty(TREE, num_reqs, 9, torch.float32, torch.device("cpu"))
    everyone, ones = torch.arange(num_reqs), torch.ones(num_reqs)
    target = TargetRows(
        torch.zeros(len(node_tokens), 9),
        ones,
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(num_nodes, dtype=torch.int32),
        torch.tensor(node_tokens),
        torch.tensor(drawn),
    )
    paths = MatchRule("match", PORTABLE_KERNELS).verify(
        target, Requests(everyone, everyone, ones, everyone), state
    )
    assert paths.num_emitted.tolist() == [sum(n >= 0 for n in path) for path in paths.path.tolist()]
    return paths.tokens.tolist(), paths.path.tolist()


@pytest.mark.parametrize(
    ("drawn", "tokens", "path"),
    [
        # the root's children are 1 and 2, below them are 3 and 4, and 3
        ([5, 1, 2, 0, 0, 0], [5, -1, -1], [0, -1, -1]),
        ([1, 8, 3, 0, 0, 0], [1, 8, -1], [0, 1, -1]),
        ([1, 4, 3, 0, 7, 0], [1, 4, 7], [0, 1, 4]),
        ([2, 4, 3, 0, 0, 6], [2, 3, 6], [0, 2, 5]),
        ([2, 3, 4, 0, 0, 6], [2, 4, -1], [0, 2, -1]),
    ],
)
def test_the_walk_goes_where_the_target_draws(drawn, tokens, path):
    assert verified([5], [0, 1, 2, 3, 4, 3], drawn) == ([tokens], [path])


def test_a_cut_tree_ends_before_the_next_requests_rows():
    """The first tree kept one node; the rows after it, whose tokens would match, are another's."""
    tokens, path = verified([1, 1], [0, 1, 2, 1], [2, 0, 1, 8])
    assert path == [[0, -1, -1], [0, 1, -1]]
    assert tokens == [[2, -1, -1], [1, 8, -1]]
    # what is left of a node's children is still accepted from
    assert verified([1], [0, 1], [1, 6]) == ([[1, 6, -1]], [[0, 1, -1]])
    assert verified([0], [0], [4]) == ([[4, -1, -1]], [[0, -1, -1]])
