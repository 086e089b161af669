# SPDX-License-Identifier: Apache-2.0
"""The phases of a tuning, each going on from what is in the state file."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_spechub.measure.benchmark import methods
from vllm_spechub.measure.benchmark.interleaved import (
    Failure,
    Interleaved,
    Point,
    Row,
    Setup,
    encode,
)
from vllm_spechub.measure.benchmark.machine import device_name, versions
from vllm_spechub.measure.tuning import rates
from vllm_spechub.measure.tuning.choose import (
    Curve,
    candidate_trees,
    chain_curves,
    choose,
    curve,
    draft_costs,
)
from vllm_spechub.measure.tuning.state import State
from vllm_spechub.offline.simulation.texts import read_prompts
from vllm_spechub.trees import measured_schedule
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels.rules import DEFAULT_RULE

TUNED = "tuned"


@dataclass(frozen=True)
class TuningRequest:
    """What to tune, and how thoroughly."""

    target: str
    draft: str
    prompts: Path
    limit: int | None
    # those to choose from
    rules: tuple[str, ...]
    temperature: float
    # numbers of drafted nodes, chain lengths and batches to try, ascending
    nodes: tuple[int, ...]
    chains: tuple[int, ...]
    batches: tuple[int, ...]
    # of each text from which acceptance is measured, and of each request that is timed
    texts: int
    tokens: int
    repetitions: int
    engine: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """What measurements depend on."""
        prompts = hashlib.sha256(self.prompts.read_bytes()).hexdigest()[:16]
        here = {"device": device_name(), "versions": versions()}
        return vars(self) | {"prompts": prompts} | here


@dataclass
class Tuned:
    """What came out."""

    rule: str
    schedule: measured_schedule.Schedule
    # by name of the method
    trees: dict[str, TokenTree]
    curves: dict[str, Curve]
    chains: dict[int, Curve]
    # (first, last, name of the method or None)
    ranges: list[tuple[int, int | None, str | None]]
    # plain vLLM's tokens/s by batch
    plain: dict[int, float]
    # of the last phase: plain vLLM, its best chains and the schedule
    checked: list[Row] = field(default_factory=list)

    @property
    def speculates(self) -> bool:
        return any(name for *_, name in self.ranges)

    def choice(self, batch: int) -> str | None:
        return next(n for first, last, n in self.ranges if first <= batch <= (last or batch))

    def predicted(self, batch: int) -> float:
        """Tokens/s over plain vLLM's."""
        name = self.choice(batch)
        return self.curves[name].gain(batch) if name else 1.0

    def best_chain(self, batch: int) -> int | None:
        """The length of the chain that is predicted to be the fastest."""
        return max(self.chains, key=lambda k: self.chains[k].gain(batch), default=None)


def tree_name(tree: TokenTree) -> str:
    return f"{tree.num_nodes} nodes, {tree.depth} deep"


def tree_spec(tree: TokenTree) -> str | list[int]:
    """The tree as `tree` and `tree_by_batch_size` take it."""
    text = str(tree)
    return json.loads(text) if text.startswith("[") else text


class Tuning:
    """One tuning: `run` goes through the phases; all that it measures is in `state`."""

    def __init__(
        self, request: TuningRequest, state: State, resident: int | None, console: Console
    ) -> None:
        self.request, self.state, self.console = request, state, console
        self.points = [Point(batch, request.temperature) for batch in request.batches]
        prompts = encode(request.target, read_prompts(request.prompts, request.limit))
        self.setup = Setup(
            request.target, request.draft, prompts, request.tokens, request.engine, resident
        )
        first = range(request.repetitions)
        self.trying, self.checking = first, range(first.stop, 2 * first.stop)

    def run(self) -> Tuned:
        """All phases.

        Raises:
            ValueError: models or prompts that do not fit.
            EngineFailed: plain vLLM's engine did not start or stopped.
        """
        request, draft = self.request, self.request.draft
        self._acceptance()
        rule = rates.best_rule(self.state.simulated, DEFAULT_RULE)
        by_slot = rates.guide_rates(self.state.rates, rule)

        chains = [methods.chain(draft, length) for length in request.chains]
        self._measure("plain vLLM and its chains", [methods.plain(), *chains], self.trying)
        rows = self._tried([method.name for method in chains])
        chain = chain_curves(rows, request.chains)
        if not chain:
            raise ValueError("no chain could be measured, so a level's cost is unknown")
        costs = draft_costs(chain)
        ends = dict.fromkeys([costs[request.batches[0]], costs[request.batches[-1]]])

        trees = {tree_name(t): t for t in candidate_trees(by_slot, request.nodes, list(ends))}
        self._measure(
            "trees",
            [methods.plain(), *(self._method(name, rule, tree=trees[name]) for name in trees)],
            self.trying,
        )
        curves = {name: curve(found) for name in trees if (found := self._tried([name]))}
        # one that stopped says nothing about larger batches
        curves = {
            name: found
            for name, found in curves.items()
            if len(found.step_time) == len(request.batches)
        }
        ranges = choose(curves, request.batches[-1])
        schedule = [
            [first, last, tree_spec(trees[name]) if name else None] for first, last, name in ranges
        ]
        plain = {
            batch: median(r.tokens_per_s for r in self._tried([methods.PLAIN]) if r.batch == batch)
            for batch in request.batches
        }
        tuned = Tuned(rule, schedule, trees, curves, chain, ranges, plain)
        if tuned.speculates:
            best = sorted({tuned.best_chain(batch) for batch in request.batches})
            compared = [methods.plain(), *(methods.chain(draft, length) for length in best)]
            compared.append(
                methods.spechub(TUNED, draft, verification=rule, tree_by_batch_size=schedule)
            )
            self._measure("the schedule", compared, self.checking)
            tuned.checked = [r for r in self.state.rows.values() if r.repetition in self.checking]
        return tuned

    def _method(self, name: str, rule: str, tree: TokenTree) -> methods.Method:
        return methods.spechub(name, self.request.draft, verification=rule, tree=tree_spec(tree))

    def _tried(self, names: Sequence[str]) -> list[Row]:
        return [
            row
            for row in self.state.rows.values()
            if row.method in names and row.repetition in self.trying
        ]

    def _acceptance(self) -> None:
        if self.state.rates:
            return
        request = self.request
        study = rates.Study(
            request.target,
            request.draft,
            request.prompts,
            request.limit,
            request.rules,
            request.temperature,
            request.texts,
            request.tokens,
        )
        with self._bar("acceptance") as (progress, task):

            def advance(label: str, done: int, total: int) -> None:
                progress.update(task, description=label, completed=done, total=total)

            self.state.rates, self.state.simulated = rates.measure(study, advance)
        self.state.write()

    def _measure(self, what: str, compared: list[methods.Method], repetitions: range) -> None:
        with self._bar(what) as (progress, task):
            runs = Interleaved(
                self.setup,
                compared,
                self.points,
                repetitions,
                known=list(self.state.rows.values()),
                say=lambda text: progress.update(task, description=f"{what}: {text}"),
            )
            progress.update(task, total=runs.total)
            with closing(runs.run()) as measured:
                for found in measured:
                    if isinstance(found, Failure):
                        self.console.print(f"{found.method} failed:\n{found.log}", markup=False)
                        continue
                    self.state.add(found)
                    progress.advance(task)
            progress.update(task, description=what)

    @contextmanager
    def _bar(self, what: str) -> Iterator[tuple[Progress, Any]]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self.console) as progress:
            yield progress, progress.add_task(what, total=None)
