# SPDX-License-Identifier: Apache-2.0
"""Metrics of trees: vLLM's speculative counters, which mean the same as for chains, and our own.

The scheduler fills `TreeDecodingStats` once per step; it travels to the frontend inside vLLM's own
`SchedulerStats`, and there `TreeMetrics` feeds Prometheus and `TreeLogging` the periodic line.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import numpy as np
import prometheus_client
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_spechub.integration.reporting import reporting
from vllm_spechub.trees.schedule import TreeSchedule
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels.constants import MAX_CHILDREN

FALLBACKS = {
    "grammar": "its drafts were not known when its grammar masks were made",
    "max_model_len": "it had reached the end of its context",
    "budget": "max_num_batched_tokens or the KV cache had no room for drafts",
    "load": "tree_by_batch_size chose no tree in its last step",
    "lost": "others drafted in the place of its draft while it missed steps",
    "nothing_found": "the proposer found nothing to draft",
}
"""The reasons why a decoding request had no tree in a step, by the value of the label `reason`."""


@dataclass
class TreeDecodingStats(SpecDecodingStats):
    """The statistics of one step.

    The inherited fields count depths, so they mean the same as for chains.
    """

    num_nodes: int = 0
    """The number of drafted nodes that were verified, over all requests."""
    width: int = 0
    """The number of drafted nodes of the largest tree, 0 if no request had a tree."""
    accepted_by_slot: list[int] = field(default_factory=list)
    """The number of accepted nodes by their place among their siblings."""
    fallbacks: dict[str, int] = field(default_factory=dict)
    """The number of decoding requests without a tree, by reason."""

    @classmethod
    def new(cls, num_spec_tokens: int) -> "TreeDecodingStats":
        """Empty statistics for trees of up to `num_spec_tokens` levels."""
        # vLLM's method makes a `cls`, but its annotation names vLLM's class.
        stats = cast(TreeDecodingStats, super().new(num_spec_tokens))
        stats.accepted_by_slot = [0] * MAX_CHILDREN
        return stats


class StepObserver:
    """Counts the trees of a scheduler's steps.

    Args:
        schedule: the trees that may be drafted.
    """

    def __init__(self, schedule: TreeSchedule) -> None:
        self.depth = schedule.depth
        # for each of the schedule's trees, the depth of every node, root first
        self.depths = [tree.depths.tolist() for tree in schedule.trees]
        # of static trees: the place of every node among its siblings
        self._slots = [
            np.arange(tree.num_nodes + 1) - tree.first_child[np.concatenate([[0], tree.parents])]
            if isinstance(tree, TokenTree)
            else None
            for tree in schedule.trees
        ]

    def add_tree(
        self,
        stats: TreeDecodingStats | None,
        tree: int,
        num_nodes: int,
        num_accepted: int,
        # [depth + 1] the accepted node of each depth, 0 first, -1 past the end
        path: np.ndarray,
        # [depth] their places among their siblings; None if all trees are static
        slots: np.ndarray | None = None,
    ) -> TreeDecodingStats:
        """Add one request's verified tree.

        Args:
            stats: the step's statistics so far, None at its first tree.
            tree: the tree's place in the schedule.
            num_nodes: the number of its drafted nodes, which may be fewer than it has; the depth
                that remains is what counts as drafted.
            num_accepted: the number of accepted tokens, without the bonus token.
            path: the accepted nodes.
            slots: of a tree that the step has decided, where they stand.
        """
        stats = stats or TreeDecodingStats.new(self.depth)
        stats.observe_draft(self.depths[tree][num_nodes], num_accepted)
        stats.num_nodes += num_nodes
        stats.width = max(stats.width, num_nodes)
        static = self._slots[tree]
        if static is not None:
            slots = static[path[1 : num_accepted + 1]]
        assert slots is not None
        for slot in slots[:num_accepted].tolist():
            stats.accepted_by_slot[slot] += 1
        return stats


@dataclass
class TreeRequestMetrics(RequestSpecDecodeMetrics):
    """vLLM's per-request metrics, which receive a tree's number of nodes and count its depth.

    `depths` are the depths of the nodes of the tree that is counted next; the scheduler sets them.
    """

    depths: list[int] = field(default_factory=list)

    @classmethod
    def for_observer(cls, observer: StepObserver) -> "TreeRequestMetrics":
        """Empty metrics for the trees that an observer counts."""
        # vLLM's method makes a `cls`, but its annotation names vLLM's class.
        return cast(TreeRequestMetrics, cls.new(observer.depth))

    def observe(self, num_draft_tokens: int, num_accepted: int, detailed: bool = False) -> None:
        with reporting("metrics of requests"):
            super().observe(self.depths[num_draft_tokens], num_accepted, detailed)


class TreeMetrics:
    """Prometheus metrics of trees, in addition to vLLM's `vllm:spec_decode_*`.

    Args:
        schedule: the trees that may be drafted.
        labelnames: vLLM's labels.
        per_engine_labelvalues: their values, by engine.
        counter_cls: vLLM's class for counters, which is Ray's within Ray.
    """

    def __init__(
        self,
        schedule: TreeSchedule,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
        counter_cls: Any = prometheus_client.Counter,
    ) -> None:
        def counter(name: str, documentation: str, *labels: str) -> Any:
            return counter_cls(
                name=f"vllm:spechub_{name}",
                documentation=documentation,
                labelnames=[*labelnames, *labels],
            )

        def per_engine(metric: Any) -> dict[int, Any]:
            return {idx: metric.labels(*values) for idx, values in per_engine_labelvalues.items()}

        self.labelvalues = per_engine_labelvalues
        self.nodes = per_engine(counter("num_nodes", "Drafted nodes that the target verified."))
        self.accepted_by_slot = counter(
            "num_accepted_tokens_per_slot", "Accepted nodes by position among siblings.", "slot"
        )
        histogram_cls: Any = prometheus_client.Histogram
        if counter_cls is not prometheus_client.Counter:
            from vllm.v1.metrics.ray_wrappers import RayHistogramWrapper

            histogram_cls = RayHistogramWrapper
        self.emitted = per_engine(
            histogram_cls(
                name="vllm:spechub_emitted_tokens",
                documentation="Tokens that a verified tree emitted, including the bonus token.",
                buckets=list(range(1, schedule.depth + 2)),
                labelnames=labelnames,
            )
        )
        self.steps = counter(
            "steps", "Engine steps by the number of drafted nodes of their largest tree.", "width"
        )
        self.fallbacks = counter(
            "fallback_steps",
            "Steps in which a decoding request had no tree: "
            + "; ".join(f"{reason}: {why}" for reason, why in FALLBACKS.items()),
            "reason",
        )
        self.max_children = schedule.max_children
        for values in per_engine_labelvalues.values():
            # A counter of something that never happens must read 0 instead of being absent.
            for slot in range(self.max_children):
                self.accepted_by_slot.labels(*values, str(slot))
            for reason in FALLBACKS:
                self.fallbacks.labels(*values, reason)

    def observe(self, stats: TreeDecodingStats, engine_idx: int = 0) -> None:
        """Count the statistics of one step of an engine."""
        values = self.labelvalues[engine_idx]
        self.nodes[engine_idx].inc(stats.num_nodes)
        for slot, count in enumerate(stats.accepted_by_slot[: self.max_children]):
            self.accepted_by_slot.labels(*values, str(slot)).inc(count)
        for tokens, count in enumerate(emitted_histogram(stats), start=1):
            for _ in range(count):
                self.emitted[engine_idx].observe(tokens)
        self.steps.labels(*values, str(stats.width)).inc()
        for reason, count in stats.fallbacks.items():
            self.fallbacks.labels(*values, reason).inc(count)


def emitted_histogram(stats: SpecDecodingStats) -> list[int]:
    """The numbers of trees that emitted 1, 2, .., depth + 1 tokens."""
    reached = [stats.num_drafts, *stats.num_accepted_tokens_per_pos, 0]
    return [a - b for a, b in pairwise(reached)]


class TreeLogging:
    """The line about trees in vLLM's periodic log."""

    def __init__(self) -> None:
        self.steps: list[TreeDecodingStats] = []

    def observe(self, stats: TreeDecodingStats) -> None:
        """Keep the statistics of one step for the next line."""
        self.steps.append(stats)

    def log(self, log_fn: Callable[..., None]) -> None:
        """Log a line about the steps since the last one, if there were any."""
        steps, self.steps = self.steps, []
        if not steps:
            return
        accepted = np.sum([stats.accepted_by_slot for stats in steps], axis=0)
        share = accepted / max(accepted.sum(), 1)
        fallbacks: Counter[str] = Counter()
        for stats in steps:
            fallbacks.update(stats.fallbacks)
        log_fn(
            "SpecHub metrics: Drafted: %d nodes in %d trees, Accepted by slot: %s, "
            "Without a tree: %s",
            sum(stats.num_nodes for stats in steps),
            sum(stats.num_drafts for stats in steps),
            ", ".join(f"{value:.3f}" for value in share),
            ", ".join(f"{count} ({reason})" for reason, count in fallbacks.items()) or "none",
        )
