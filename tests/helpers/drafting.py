# SPDX-License-Identifier: Apache-2.0
"""Trees, and drafts for them, shared by the kernel tests."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_spechub.triton_kernels.arguments import Requests, TreeTables
from vllm_spechub.triton_kernels.child_sampling import sample_children


@dataclass
class Tree:
    """A static tree, given by the number of children of each node in breadth-first order."""

    counts: list[int]

    def __post_init__(self):
        self.num_children = torch.tensor(self.counts, dtype=torch.int32)
        self.first_child = torch.zeros_like(self.num_children)
        self.internal_index = torch.full_like(self.num_children, -1)
        depth = [0]
        for node, count in enumerate(self.counts):
            if count:
                self.internal_index[node] = int(self.internal_index.max()) + 1
                self.first_child[node] = len(depth)
                depth += [depth[node] + 1] * count
        assert len(depth) == len(self.counts)
        self.level_sizes = [depth.count(level) for level in range(max(depth) + 1)]
        self.parents = torch.zeros_like(self.num_children)
        for node, count in enumerate(self.counts):
            first = int(self.first_child[node])
            self.parents[first : first + count] = node
        self.parents[0] = 0

    @property
    def tables(self) -> TreeTables:
        return TreeTables(self.first_child, self.num_children, self.internal_index, self.parents)

    @property
    def num_drafted(self) -> int:
        return len(self.counts) - 1


BINARY = Tree([2] * 7 + [0] * 8)
UNEQUAL = Tree([3, 2, 1, 0, 4, 0, 2, 0, 0, 0, 1, 0, 0, 0])
CHAIN = Tree([1, 1, 1, 1, 0])
WIDE = Tree([4, 4, 0, 0, 0, 0, 0, 0, 0])


@dataclass
class Draft:
    """What verification needs of drafting."""

    # [num_reqs, num_nodes]
    tokens: torch.Tensor
    # [max_num_reqs, num_internal, vocab_size]
    logits: torch.Tensor
    # [max_num_reqs, num_internal]
    sampled: torch.Tensor


def draft_tree(
    tree: Tree,
    # from the tokens [num_reqs, depth + 1] of a node's path to its logits [num_reqs, vocab_size]
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    # [num_reqs]
    root_tokens: torch.Tensor,
    # [max_num_reqs]
    temperature: torch.Tensor,
    # [max_num_reqs]
    seeds: torch.Tensor,
    # [num_reqs]
    req_idx: torch.Tensor,
    # [num_reqs]
    root_positions: torch.Tensor,
    rule: str,
    sharpening: float = 1.0,
) -> Draft:
    """Draft a tree node by node, with the reference."""
    num_reqs = len(root_tokens)
    paths = {0: root_tokens.unsqueeze(1)}
    logits, bits = [], []
    for node, count in enumerate(tree.counts):
        if not count:
            continue
        logits.append(logits_of(paths[node]))
        children, sampled = sample_children(
            logits[-1],
            torch.full((num_reqs,), node, dtype=torch.int32),
            torch.full((num_reqs,), count, dtype=torch.int32),
            Requests(req_idx, root_positions, temperature, seeds),
            rule=rule,
            max_children=count,
            sharpening=sharpening,
        )
        bits.append(sampled)
        for position in range(count):
            child = int(tree.first_child[node]) + position
            paths[child] = torch.cat([paths[node], children[:, position : position + 1]], dim=1)
    max_num_reqs = len(seeds)
    shape = (max_num_reqs, len(logits), logits[0].shape[1])
    stored = torch.full(shape, float("nan"), dtype=logits[0].dtype)
    stored[req_idx] = torch.stack(logits, dim=1)
    sampled = torch.full(shape[:2], -1, dtype=torch.int32)
    sampled[req_idx] = torch.stack(bits, dim=1)
    tokens = torch.stack([paths[node][:, -1] for node in range(len(tree.counts))], dim=1)
    return Draft(tokens, stored, sampled)


def huge_rows(num_rows: int, stride: int, vocab_size: int) -> torch.Tensor:
    """bfloat16 [num_rows, vocab_size] with a huge row stride, in memory that is never touched."""
    storage = torch.UntypedStorage(2 * (num_rows * stride + vocab_size))
    return torch.tensor([], dtype=torch.bfloat16).set_(
        storage, 0, (num_rows, vocab_size), (stride, 1)
    )
