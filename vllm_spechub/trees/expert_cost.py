# SPDX-License-Identifier: Apache-2.0
"""What a step of a mixture of experts costs, and the default schedule that follows from it.

Every row of a step chooses its own experts, so that verifying a tree reads more weights than plain
decoding does, until all experts are read anyway. With few requests drafting costs experts; with
many it costs nothing. All of this is an estimate; `vllm-spechub tune` measures it.
"""

from collections.abc import Sequence
from itertools import groupby

from vllm_spechub.trees.best_tree import Rates
from vllm_spechub.trees.tree import TokenTree

EXPERT_SHARE = 0.75
"""The experts' share of the weights that a step with one row reads: between the 0.6 of
Qwen3-30B-A3B and the 0.87 of Mixtral 8x7B."""
ROWS_PER_WEIGHT = 150
"""For so many rows a GPU computes as long as it reads a weight. The peaks of an H100, 989 TFLOP/s
in bfloat16 and 3.35 TB/s, would allow 295; half of that is a guess at what its kernels reach."""
LEVEL_COST = 0.05
"""A draft pass, relative to a step with one row."""
WORTHWHILE = 1.1
"""A tree is drafted if it is estimated to be faster than plain decoding by at least this factor."""


def experts_read(experts: int, chosen: int, rows: int) -> float:
    """The expected number of different experts that a layer reads for so many rows, if each row
    chooses independently of the others. Rows of one tree choose alike more often than that.

    Args:
        experts: of a layer.
        chosen: how many a row chooses.
    """
    return experts * (1 - (1 - chosen / experts) ** rows)


def step_cost(experts: int, chosen: int, rows: int) -> float:
    """The duration of a step, relative to one with one row: reading weights, or arithmetic."""
    reading = 1 - EXPERT_SHARE + EXPERT_SHARE * experts_read(experts, chosen, rows) / chosen
    return max(reading, rows / ROWS_PER_WEIGHT)


def tokens_per_step(tree: TokenTree, rates: Rates) -> float:
    """The expected number of tokens that a step emits, the bonus token included, if acceptance
    depends on a node's number of children and the child's slot only."""
    reached = [1.0]
    for node, parent in enumerate(tree.parents, start=1):
        slots = rates[int(tree.num_children[parent])]
        reached.append(reached[parent] * slots[node - int(tree.first_child[parent])])
    return sum(reached)


def schedule_for_experts(
    experts: int, chosen: int, trees: Sequence[TokenTree], rates: Rates
) -> list[tuple[int, int | None, TokenTree | None]]:
    """The ranges of a `TreeSchedule` that is estimated to be the fastest: usually nothing for few
    requests, trees for more, and nothing again once arithmetic decides.

    Args:
        experts: of a layer.
        chosen: how many of them a row chooses.
        trees: what may be drafted; with different numbers of nodes.
        rates: acceptance by number of children and slot.
    """
    emitted = {tree: tokens_per_step(tree, rates) for tree in trees}

    def fastest(reqs: int) -> TokenTree | None:
        def gain(tree: TokenTree) -> float:
            plain = step_cost(experts, chosen, reqs)
            verified = step_cost(experts, chosen, reqs * (1 + tree.num_nodes))
            return emitted[tree] * plain / (verified + LEVEL_COST * tree.depth)

        best = max(trees, key=gain)
        return best if gain(best) >= WORTHWHILE else None

    # where even plain decoding computes longer than it reads
    most = ROWS_PER_WEIGHT * experts // chosen
    ranges: list[tuple[int, int | None, TokenTree | None]] = []
    for tree, run in groupby(range(1, most + 1), key=fastest):
        reqs = list(run)
        ranges.append((reqs[0], reqs[-1], tree))
    if ranges[-1][2] is None:
        most = ranges.pop()[0] - 1
    return [*ranges, (most + 1, None, None)]
