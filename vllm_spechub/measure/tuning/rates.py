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
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from vllm_spechub.measure.benchmark import methods
from vllm_spechub.measure.benchmark.decoding import counters, decode
from vllm_spechub.measure.benchmark.engine import EngineProcess, close_all
from vllm_spechub.measure.benchmark.interleaved import Setup, engine_options
from vllm_spechub.measure.tuning.request import TuningRequest
from vllm_spechub.trees.level_tree import LevelTree, width_candidates
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels.rules import rates_of

if TYPE_CHECKING:
    import torch

    from vllm_spechub.offline.simulation.study import Sampling
    from vllm_spechub.offline.simulation.texts import ModelPair

T = TypeVar("T")
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
    return _apart(progress, _measure, request)


def measure_widths(
    request: TuningRequest,
    rule: str,
    static: Sequence[TokenTree],
    progress: Callable[[str, int, int], None],
) -> list[LevelTree]:
    """Simulate level widths in a separate process.

    Args:
        request: what to measure.
        rule: the verification rule.
        static: trees to find widths for.
        progress: as `measure` takes it.

    Returns:
        For each static tree, the widths of as many nodes and levels that emit the most tokens.

    Raises:
        ValueError, ChildProcessError: as `measure`.
    """
    return _apart(progress, _measure_widths, request, rule, static)


def _apart(progress: Callable[[str, int, int], None], work: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a separate process that reports its progress."""
    fork = multiprocessing.get_context("fork")
    # A pipe has no lock that a killed process could keep, unlike a queue.
    reports, worker_reports = fork.Pipe(duplex=False)
    with ProcessPoolExecutor(1, fork, _start_worker, (worker_reports,)) as pool:
        try:
            worker = pool.submit(os.getpid).result()
            measured = pool.submit(work, *arguments)
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


def _report(label: str, done: int, total: int) -> None:
    _progress.send((label, done, total))


def _loaded(request: TuningRequest, depth: int) -> "tuple[ModelPair, list[torch.Tensor], Sampling]":
    """The models, the tokenised prompts and how texts are sampled, for trees of some depth."""
    import torch

    from vllm_spechub.offline.simulation.load import load
    from vllm_spechub.offline.simulation.study import Sampling

    sampling = Sampling(texts=request.texts, tokens=request.tokens)
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    asked = request.sources, request.prompts, request.limit
    layers = request.draft_layers
    return *load(*asked, sampling, depth, None, dtype, draft_layers=layers), sampling


def _measure(request: TuningRequest) -> Measurement:
    from vllm_spechub.offline.simulation.drafts import Variant
    from vllm_spechub.offline.simulation.study import measure_rates, pick_tree
    from vllm_spechub.trees.best_tree import best_shape

    pair, prompts, sampling = _loaded(request, REFERENCE_DEPTH)
    rules = dict.fromkeys([*request.rules, *map(rates_of, request.rules)])
    rates = measure_rates(
        pair,
        prompts,
        [Variant(rule) for rule in rules],
        request.temperature,
        sampling,
        REFERENCE_DEPTH,
        _report,
    )
    tokens_per_step = {}
    for rule in request.rules:
        trees = [
            best_shape(rates[Variant(other)], REFERENCE_NODES, REFERENCE_DEPTH).tree
            for other in dict.fromkeys([rule, rates_of(rule)])
        ]
        _, tokens_per_step[rule] = pick_tree(
            pair, prompts, Variant(rule), trees, [request.temperature], sampling, _report
        )
    by_rule = {
        str(variant): {str(k): list(slots) for k, slots in table.items()}
        for variant, table in rates.items()
    }
    return Measurement(by_rule, tokens_per_step)


def _measure_widths(
    request: TuningRequest, rule: str, static: Sequence[TokenTree]
) -> list[LevelTree]:
    from vllm_spechub.offline.simulation import study
    from vllm_spechub.offline.simulation.drafts import Plan, Variant

    pair, prompts, sampling = _loaded(request, max(tree.depth for tree in static))
    widths = [width_candidates(tree.num_nodes, tree.depth, [tree]) for tree in static]
    plans = [[Plan(Variant(rule), levels) for levels in of_tree] for of_tree in widths]
    every = [plan for of_tree in plans for plan in of_tree]
    label = "tokens per step of level widths"
    found = study.measure(pair, prompts, every, request.temperature, sampling, 2, _report, label)
    best = [max(of_tree, key=lambda plan: found[plan].tokens.mean()).tree for of_tree in plans]
    return cast("list[LevelTree]", best)


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
