# SPDX-License-Identifier: Apache-2.0
"""Logits processors that read a token's history, and rows laid out so that they read the right one.

vLLM's penalties, bad words, thinking budgets and custom processors take the rows of a request as
one chain. A tree is unrolled for them: every root-to-leaf path becomes a chain of rows. Of a tree
that each step decides only the device knows the paths, so every node's path becomes a chain.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from vllm_spechub.trees.tree import TokenTree, Tree

PROCESSED_BYTES = 256 * 2**20
"""Of the fp32 rows that are processed at once. vLLM's processors allocate several times what they
are given, and this memory is kept free of KV cache."""


def most_processed_rows(vocab_size: int) -> int:
    """The most rows of logits that are processed at once, or those of one request."""
    return max(1, PROCESSED_BYTES // (vocab_size * np.dtype(np.float32).itemsize))


class HistoryProcessors(LogitsProcessor):
    """All of vLLM's logits processors as one, which remembers what requests use.

    Args:
        processors: vLLM's, in their order.
        max_num_reqs: request-state slots.
    """

    def __init__(self, processors: list[LogitsProcessor], max_num_reqs: int) -> None:
        self.processors = processors
        # [max_num_reqs] whether any processor edits the request's rows
        self.used = np.zeros(max_num_reqs, dtype=bool)
        # [max_num_reqs] whether one of those reads the tokens before a row
        self.needs_history = np.zeros(max_num_reqs, dtype=bool)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        # Every processor must see the request. Biases, allowed tokens and min_tokens only need a
        # row's position. The thinking budget is not among the processors, but reads the history.
        used = [p.add_request(req_idx, sampling_params) for p in self.processors]
        budget = sampling_params.thinking_token_budget is not None
        self.needs_history[req_idx] = budget or any(
            uses and not isinstance(processor, LogitBiasState)
            for processor, uses in zip(self.processors, used, strict=True)
        )
        self.used[req_idx] = budget or any(used)
        return any(used)

    def apply_staged_writes(self) -> None:
        for processor in self.processors:
            processor.apply_staged_writes()

    def apply(self, logits, ctx):
        for processor in self.processors:
            logits = processor.apply(logits, ctx)
        return logits


@dataclass(frozen=True)
class UnrolledRows:
    """The logits rows of some requests, trees unrolled where a request needs its history."""

    # [num_rows] the tree row that each row copies, or, with steps to go up, the row of one below
    source: np.ndarray
    # [num_rows] how many levels the node that a row copies is above that of `source`. Only the
    # device knows the ancestors of trees that each step decides
    steps_up: np.ndarray
    # [num_rows] offset among the rows of its chain
    local_pos: np.ndarray
    # [num_rows] depth below the root
    depth: np.ndarray
    # [num_reqs + 1] each request's first row, then their number
    bounds: np.ndarray

    def for_requests(self, start: int, end: int) -> "UnrolledRows":
        """The rows of the requests `start` to `end - 1`."""
        rows = slice(self.bounds[start], self.bounds[end])
        bounds = self.bounds[start : end + 1] - self.bounds[start]
        return UnrolledRows(
            self.source[rows],
            self.steps_up[rows],
            self.local_pos[rows],
            self.depth[rows],
            bounds,
        )

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """The tree rows, ascending, and for each a row with its own history. A node that several
        paths share has the same row in each."""
        (own,) = (self.steps_up == 0).nonzero()
        tree_rows, first = np.unique(self.source[own], return_index=True)
        return tree_rows, own[first]


@lru_cache(maxsize=256)
def _unrolled_nodes(tree: Tree, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `num_nodes` nodes and the root, each once for every node on its path; and the
    depths of those. [num_rows] each"""
    lengths = tree.depths[: num_nodes + 1] + 1
    nodes = np.repeat(np.arange(num_nodes + 1), lengths)
    return nodes, np.concatenate([np.arange(length) for length in lengths])


@lru_cache(maxsize=256)
def _unrolled_tree(tree: TokenTree, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """The nodes of all root-to-leaf paths in the tree's first `num_nodes` nodes, path after path,
    and their depths. [num_rows] each"""
    kept = range(num_nodes + 1)
    inner = {tree.parents[node - 1] for node in kept if node}
    paths = [tree.paths[node] for node in kept if node not in inner]
    nodes = np.concatenate([np.array(path) for path in paths])
    depths = np.concatenate([np.arange(len(path)) for path in paths])
    return nodes, depths


def unroll(
    # [num_reqs]
    trees: Sequence[Tree],
    # [num_reqs]
    num_nodes: np.ndarray,
    # [num_reqs]
    first_row: np.ndarray,
    # [num_reqs]
    needs_history: np.ndarray,
) -> UnrolledRows:
    """Lay rows out for vLLM's processors: as chains for requests that need their history, else as
    the tree's rows are.

    Args:
        trees: each request's tree.
        num_nodes: how many of its nodes were drafted.
        first_row: the root's row among the target's.
        needs_history: whether a processor reads the tokens before a row.
    """
    sources, steps_up, local_positions, depths = [], [], [], []
    for tree, count, row, history in zip(trees, num_nodes, first_row, needs_history, strict=True):
        if not history:
            nodes = np.arange(count + 1)
            depth = tree.depths[: count + 1]
            local = steps = np.zeros(count + 1, dtype=np.int64)
        elif isinstance(tree, TokenTree):
            nodes, depth = _unrolled_tree(tree, int(count))
            local, steps = depth, np.zeros_like(depth)
        else:
            nodes, depth = _unrolled_nodes(tree, int(count))
            local, steps = depth, tree.depths[nodes] - depth
        sources.append(nodes + row)
        steps_up.append(steps)
        local_positions.append(local)
        depths.append(depth)
    return UnrolledRows(
        np.concatenate(sources),
        np.concatenate(steps_up),
        np.concatenate(local_positions),
        np.concatenate(depths),
        np.cumsum([0, *map(len, sources)]),
    )
