# SPDX-License-Identifier: Apache-2.0
"""Measure the acceptance by slot of every rule on the user's prompts.

Models that run by themselves and EAGLE heads are measured with transformers, other heads in
engines.
"""

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from vllm_spechub.measure.benchmark import methods
from vllm_spechub.measure.benchmark.decoding import counters, decode
from vllm_spechub.measure.benchmark.engine import EngineProcess, close_all
from vllm_spechub.measure.benchmark.interleaved import Setup, engine_options
from vllm_spechub.measure.tuning.request import TuningRequest
from vllm_spechub.triton_kernels.rules import rates_of

REFERENCE_NODES, REFERENCE_DEPTH = 15, 5
"""Rules are compared on trees of this size, each rule on its own best tree."""
PREFERENCE = 0.01
"""Another rule replaces the default only if it emits more tokens by at least this share."""

COMPLETE_TREES = {1: 5, 2: 3, 3: 2, 4: 2}
"""By the number of children of every node, the depths of the trees that heads are measured with."""
POLL_SECONDS = 0.2

_progress: Connection
"""In the measuring process: where it reports its progress."""


class Measurement(NamedTuple):
    """The acceptance of every rule on the user's prompts."""

    # by rule and number of children (a string, for JSON): the acceptance rate of each slot
    rates: dict[str, dict[str, list[float]]]
    # by rule: simulated tokens per step on its own best tree
    tokens_per_step: dict[str, float]


def measure(request: TuningRequest, progress: Callable[[str, int, int], None]) -> Measurement:
    """Measure acceptance in a separate process, which frees the models' memory when it ends.

    Args:
        request: what to measure.
        progress: called with what is measured, the number of finished prompts, and that of all
            prompts.

    Raises:
        ValueError: the models do not fit together, or the prompts cannot be read.
        ChildProcessError: the process was killed, for example because memory ran out.
    """
    fork = multiprocessing.get_context("fork")
    # A pipe has no lock that a killed process could keep, unlike a queue.
    reports, worker_reports = fork.Pipe(duplex=False)
    with ProcessPoolExecutor(1, fork, _start_worker, (worker_reports,)) as pool:
        try:
            worker = pool.submit(os.getpid).result()
            measured = pool.submit(_measure, request)
            while reports.poll(POLL_SECONDS) or not measured.done():
                if reports.poll():
                    progress(*reports.recv())
            return measured.result()
        except KeyboardInterrupt:
            os.kill(worker, signal.SIGKILL)  # otherwise the pool would wait for the result
            raise
        except BrokenProcessPool:
            raise ChildProcessError(
                "the process that measures acceptance was killed, usually for lack of memory; free "
                "some, or give fewer --texts, fewer --tokens or shorter prompts"
            ) from None


def _start_worker(reports: Connection) -> None:
    global _progress
    _progress = reports
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process stops this one


def _measure(request: TuningRequest) -> Measurement:
    import torch

    from vllm_spechub.offline.simulation.drafts import Variant
    from vllm_spechub.offline.simulation.load import load
    from vllm_spechub.offline.simulation.study import Sampling, measure_rates, pick_tree
    from vllm_spechub.trees.best_tree import best_shape

    def progress(label: str, done: int, total: int) -> None:
        _progress.send((label, done, total))

    sampling = Sampling(texts=request.texts, tokens=request.tokens)
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    asked = request.sources, request.prompts, request.limit
    pair, prompts = load(
        *asked, sampling, REFERENCE_DEPTH, None, dtype, draft_layers=request.draft_layers
    )
    rules = dict.fromkeys([*request.rules, *map(rates_of, request.rules)])
    rates = measure_rates(
        pair,
        prompts,
        [Variant(rule) for rule in rules],
        request.temperature,
        sampling,
        REFERENCE_DEPTH,
        progress,
    )
    tokens_per_step = {}
    for rule in request.rules:
        trees = [
            best_shape(rates[Variant(other)], REFERENCE_NODES, REFERENCE_DEPTH).tree
            for other in dict.fromkeys([rule, rates_of(rule)])
        ]
        _, tokens_per_step[rule] = pick_tree(
            pair, prompts, Variant(rule), trees, [request.temperature], sampling, progress
        )
    by_rule = {
        str(variant): {str(k): list(slots) for k, slots in table.items()}
        for variant, table in rates.items()
    }
    return Measurement(by_rule, tokens_per_step)


def measure_head(
    setup: Setup, request: TuningRequest, report: Callable[[str], None]
) -> Measurement:
    """Measure a head's acceptance with complete trees in engines, if nothing else can run it.

    A node with k children is verified once for every drafted tree, and once for every accepted
    node that has children. All depths count alike, as they do where trees are chosen.

    Args:
        setup: the models, prompts and engine options.
        request: what to tune, with one rule.
        report: called with a short text about what happens now.

    Raises:
        EngineFailed: an engine did not start or stopped early.
    """
    (rule,) = request.rules
    options = engine_options(setup, request.batches[-1], resident=1)
    by_children: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for k, depth in COMPLETE_TREES.items():
            report(f"acceptance of nodes with {k} children")
            method = methods.spechub("", request.sources.draft, verification=rates_of(rule))
            config = (method.speculative or {}) | {"tree": f"kary:{k}:{depth}"}
            log = Path(folder) / f"{k}.log"
            engine = EngineProcess(options | {"speculative_config": config}, log)
            try:
                engine.wait()
                batch, tokens = request.batches[-1], request.tokens
                arguments = setup.prompts, batch, request.temperature, tokens
                verified, accepted = engine.call(accepted_by_slot, depth, *arguments)
            finally:
                close_all([engine])
            by_children[str(k)] = [count / verified for count in accepted[:k]]
    return Measurement({rates_of(rule): by_children}, {rule: 1.0})


def accepted_by_slot(llm: Any, depth: int, *arguments: Any) -> tuple[int, list[int]]:
    """Decode, in an engine's process: how many nodes with children were verified, and how many of
    their children were accepted, by slot.

    Args:
        llm: an engine with one complete tree.
        depth: the tree's.
        arguments: as `decode` takes them.
    """
    decode(llm, *arguments)
    _, drafts, accepted_by_depth = counters(llm)
    slots = {
        int(metric.labels["slot"]): metric.value
        for metric in llm.get_metrics()
        if metric.name == "vllm:spechub_num_accepted_tokens_per_slot"
    }
    return drafts + sum(accepted_by_depth[: depth - 1]), [slots[i] for i in sorted(slots)]


def best_rule(tokens_per_step: Mapping[str, float], default: str) -> str:
    """The rule that emits the most tokens per step, or the default if it is about as good."""
    best = max(tokens_per_step, key=lambda rule: tokens_per_step[rule])
    if default in tokens_per_step:
        needed = (1 + PREFERENCE) * tokens_per_step[default]
        if tokens_per_step[best] <= needed:
            return default
    return best


def rates_for_trees(
    rates: Mapping[str, Mapping[str, Sequence[float]]], rule: str
) -> dict[int, list[float]]:
    """The acceptance rates that a rule's trees are built from, by number of children."""
    return {int(k): list(slots) for k, slots in rates[rates_of(rule)].items()}
