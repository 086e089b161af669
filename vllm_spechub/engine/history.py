# SPDX-License-Identifier: Apache-2.0
"""Logits processors that read a token's history, and rows laid out so that they read the right one.

vLLM's penalties, bad words, min_tokens, thinking budgets and custom processors take the rows of a
request as one chain. A tree is unrolled for them: every root-to-leaf path becomes a chain of rows.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from vllm_spechub.topology import TokenTree


class HistoryProcessors(LogitsProcessor):
    """vLLM's processors as one, remembering which requests use any of them."""

    def __init__(self, processors: list[LogitsProcessor], max_num_reqs: int) -> None:
        self.processors = processors
        # [max_num_reqs]
        self.used = np.zeros(max_num_reqs, dtype=bool)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        used = [p.add_request(req_idx, sampling_params) for p in self.processors]
        # The thinking budget runs outside this list, but reads history like the rest.
        budget = sampling_params.thinking_token_budget is not None
        self.used[req_idx] = any(used) or budget
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
    """A batch's logits rows, trees unrolled where a request needs its history."""

    # [num_rows] the tree row that each row copies
    source: np.ndarray
    # [num_rows] offset among the rows of its chain
    local_pos: np.ndarray
    # [num_rows] depth below the root
    depth: np.ndarray
    # [num_tree_rows] a row that holds the tree row's result
    result: np.ndarray


@lru_cache(maxsize=256)
def _unrolled_tree(tree: TokenTree, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes of all root-to-leaf paths of the first `num_nodes` nodes, one after the other, and
    each one's depth."""
    kept = range(num_nodes + 1)
    inner = {tree.parents[node - 1] for node in kept if node}
    paths = [tree.paths[node] for node in kept if node not in inner]
    nodes = np.concatenate([np.array(path) for path in paths])
    depths = np.concatenate([np.arange(len(path)) for path in paths])
    return nodes, depths


def unroll(
    tree: TokenTree,
    # [num_reqs]
    num_nodes: np.ndarray,
    # [num_reqs]
    first_row: np.ndarray,
    # [num_reqs]
    uses_history: np.ndarray,
) -> UnrolledRows:
    """Lay the rows out for vLLM's processors: chains for requests that use history, else the
    tree's rows as they are."""
    sources, local_positions, depths = [], [], []
    for count, row, history in zip(num_nodes, first_row, uses_history, strict=True):
        if history:
            nodes, depth = _unrolled_tree(tree, int(count))
            local = depth
        else:
            nodes = np.arange(count + 1)
            depth = tree.depths[: count + 1]
            local = np.zeros(count + 1, dtype=np.int64)
        sources.append(nodes + row)
        local_positions.append(local)
        depths.append(depth)
    source = np.concatenate(sources)
    result = np.empty(int((num_nodes + 1).sum()), dtype=np.int64)
    result[source] = np.arange(len(source))
    return UnrolledRows(source, np.concatenate(local_positions), np.concatenate(depths), result)
