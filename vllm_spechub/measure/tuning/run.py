# SPDX-License-Identifier: Apache-2.0
"""The phases of a tuning. Each continues from what is in the state file."""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from statistics import geometric_mean, median

from rich.console import Console

from vllm_spechub.measure import preflight
from vllm_spechub.measure.benchmark import methods
from vllm_spechub.measure.benchmark.interleaved import (
    Failure,
    Interleaved,
    Point,
    Row,
    Setup,
    default_resident,
    encode,
    engine_options,
)
from vllm_spechub.measure.terminal import progress_bar, prompt_counter
from vllm_spechub.measure.tuning import rates
from vllm_spechub.measure.tuning.choose import (
    Curve,
    candidate_trees,
    chain_curves,
    choose,
    curve,
    distinct_sizes,
    draft_costs,
    measured_prices,
)
from vllm_spechub.measure.tuning.request import TuningRequest
from vllm_spechub.measure.tuning.state import State
from vllm_spechub.offline.heads import needs_engine
from vllm_spechub.offline.simulation.texts import read_prompts
from vllm_spechub.trees import measured_schedule
from vllm_spechub.trees.best_tree import Rates
from vllm_spechub.trees.level_tree import LevelTree
from vllm_spechub.trees.tree import TokenTree, Tree
from vllm_spechub.triton_kernels.rules import DEFAULT_RULE

TUNED = "tuned"


@dataclass
class Tuned:
    """The result of a tuning."""

    rule: str
    schedule: measured_schedule.Schedule
    # by the tree's name
    trees: Mapping[str, Tree]
    curves: dict[str, Curve]
    # by length, at least one
    chains: dict[int, Curve]
    # (first batch, last batch or None, name of the tree or None)
    ranges: list[tuple[int, int | None, str | None]]
    # plain vLLM's tokens/s by batch
    plain: dict[int, float]
    # measurements of the last phase: plain vLLM, its best chains and the schedule
    checked: list[Row] = field(default_factory=list)

    @property
    def speculates(self) -> bool:
        """Whether the schedule drafts at any batch."""
        return any(name for *_, name in self.ranges)

    def choice(self, batch: int) -> str | None:
        """The name of the tree that is chosen for a batch, or None."""
        return next(n for first, last, n in self.ranges if first <= batch <= (last or batch))

    def predicted(self, batch: int) -> float:
        """Predicted tokens/s divided by plain vLLM's."""
        name = self.choice(batch)
        return self.curves[name].gain(batch) if name else 1.0

    @property
    def mean_gain(self) -> float:
        """The geometric mean of the predicted gains over the measured batches."""
        return geometric_mean([self.predicted(batch) for batch in self.plain])

    def best_chain(self, batch: int) -> int:
        """The length of the chain that is predicted to be the fastest."""
        return max(self.chains, key=lambda length: self.chains[length].gain(batch))


def tree_name(tree: Tree) -> str:
    """A tree's name in tables and plots."""
    if isinstance(tree, LevelTree):
        return str(tree)
    return f"{tree.num_nodes} nodes, {tree.depth} deep"


def tree_spec(tree: Tree) -> str | list[int]:
    """The tree in the form that `tree` and `tree_by_batch_size` accept."""
    text = str(tree)
    return json.loads(text) if text.startswith("[") else text


class Tuning:
    """One tuning. `run` goes through all phases and keeps every measurement in `state`."""

    def __init__(
        self, request: TuningRequest, state: State, resident: int | None, console: Console
    ) -> None:
        self.request, self.state, self.console = request, state, console
        self.points = [Point(batch, request.temperature) for batch in request.batches]
        prompts = encode(request.sources, read_prompts(request.prompts, request.limit))
        self.setup = Setup(request.sources, prompts, request.tokens, resident)
        first = range(request.repetitions)
        self.trying, self.checking = first, range(first.stop, 2 * first.stop)

    def run(self) -> Tuned:
        """Run all phases.

        Raises:
            ValueError: the models do not fit together, or no chain could be measured.
            EngineFailed: plain vLLM's engine did not start or stopped early.
        """
        request, draft = self.request, self.request.sources.draft
        self._check_engines()
        self._measure_acceptance()
        rule = rates.best_rule(self.state.simulated, DEFAULT_RULE)

        chains = self._try_chains()
        by_slot = rates.rates_for_trees(self.state.rates, rule)
        share = self._share_of_draft()  # vLLM's chains run the whole draft
        costs = {batch: share * cost for batch, cost in draft_costs(chains).items()}
        trees, curves = self._try_candidates(costs, by_slot, rule, {})
        prices = measured_prices(trees, curves)
        if prices:  # which may suit other trees, because nodes and levels are told apart
            levels = {batch: price.level for batch, price in prices.items()}
            trees, more = self._try_candidates(levels, by_slot, rule, trees)
            curves |= more

        if request.levels:
            levels = self._level_trees(list(trees.values()), rule)
            curves = curves | self._try_trees(levels, rule)
            trees |= levels
            curves = distinct_sizes(trees, curves)

        ranges = choose(curves, request.batches[-1])
        schedule = [
            [first, last, tree_spec(trees[name]) if name else None] for first, last, name in ranges
        ]
        plain = {
            batch: median(r.tokens_per_s for r in self._tried([methods.PLAIN]) if r.batch == batch)
            for batch in request.batches
        }
        tuned = Tuned(rule, schedule, trees, curves, chains, ranges, plain)
        if tuned.speculates:
            best = sorted({tuned.best_chain(batch) for batch in request.batches})
            chained = (methods.chain(request.sources, length) for length in best)
            compared = [methods.plain(), *chained]
            compared.append(
                methods.spechub(
                    TUNED,
                    draft,
                    verification=rule,
                    tree_by_batch_size=schedule,
                    **request.proposer_options,
                )
            )
            self._measure("the schedule", compared, self.checking)
            tuned.checked = [r for r in self.state.rows.values() if r.repetition in self.checking]
        return tuned

    def _check_engines(self) -> None:
        """Raises: ValueError, with the first reason for which an engine would not start."""
        request = self.request
        tried = [methods.plain(), methods.chain(request.sources, request.chains[0])]
        own = request.proposer_options
        tried += [
            methods.spechub(f"rule {rule}", request.sources.draft, verification=rule, **own)
            for rule in request.rules
        ]
        resident = self.setup.resident or default_resident(len(tried))
        options = engine_options(self.setup, request.batches[-1], resident)
        wanted = {method.name: method.speculative for method in tried}
        for reason in preflight.engine_refusals(options, wanted).values():
            raise ValueError(reason)

    def _share_of_draft(self) -> float:
        """The share of the draft's layers that run."""
        layers, sources = self.request.draft_layers, self.request.sources
        if layers is None:
            return 1.0
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(sources.draft, **sources.draft_options)
        return layers / config.get_text_config().num_hidden_layers

    def _measure_acceptance(self) -> None:
        if self.state.rates:
            return
        with progress_bar(self.console, "prompts") as progress:
            task = progress.add_task("acceptance", total=None)

            def advance(label: str, done: int, total: int) -> None:
                progress.update(task, description=label, completed=done, total=total)

            if not needs_engine(self.request.sources):
                measured = rates.measure(self.request, advance)
            else:
                measured = rates.measure_head(
                    self.setup,
                    self.request,
                    lambda text: progress.update(task, description=text),
                )
            self.state.rates, self.state.simulated = measured
        self.state.write()

    def _try_chains(self) -> dict[int, Curve]:
        """Measure plain vLLM and its chains. Returns curves of all lengths up to the longest."""
        request = self.request
        chains = [methods.chain(request.sources, length) for length in request.chains]
        self._measure("plain vLLM and its chains", [methods.plain(), *chains], self.trying)
        curves = chain_curves(self._tried([c.name for c in chains]), request.chains)
        if not curves:
            raise ValueError("no chain could be measured, so the cost of a level is unknown")
        return curves

    def _try_candidates(
        self,
        costs: Mapping[int, float],
        by_slot: Rates,
        rule: str,
        tried: dict[str, TokenTree],
    ) -> tuple[dict[str, TokenTree], dict[str, Curve]]:
        """Measure the trees that suit what a level costs at the smallest and the largest batch, if
        they have another number of nodes than those that were tried.

        Returns:
            All trees by name, and the curves of the new ones.
        """
        batches = self.request.batches
        ends = dict.fromkeys([costs[batches[0]], costs[batches[-1]]])
        found = candidate_trees(by_slot, self.request.nodes, list(ends), tried.values())
        new = {tree_name(tree): tree for tree in found}
        return tried | new, self._try_trees(new, rule)

    def _level_trees(self, static: list[Tree], rule: str) -> dict[str, Tree]:
        """For each static tree that is no chain, the best widths of as many nodes and levels, by
        name. Of heads that run in engines only, the tree's own."""
        wide = [tree for tree in static if isinstance(tree, TokenTree) and tree.max_children > 1]
        missing = [tree for tree in wide if str(tree) not in self.state.widths]
        if missing:
            if needs_engine(self.request.sources):
                found = [LevelTree.like(tree) for tree in missing]
            else:
                with progress_bar(self.console, "prompts") as progress:
                    advance = prompt_counter(progress)
                    found = rates.measure_widths(self.request, rule, missing, advance)
            widths = zip(missing, found, strict=True)
            self.state.widths |= {str(tree): str(levels) for tree, levels in widths}
            self.state.write()
        return {
            tree_name(levels): levels
            for tree in wide
            if (levels := LevelTree.parse(self.state.widths[str(tree)]))
        }

    def _try_trees(self, trees: Mapping[str, Tree], rule: str) -> dict[str, Curve]:
        """Measure all trees. Returns curves of those that were measured at every batch."""
        tried = [
            methods.spechub(
                name,
                self.request.sources.draft,
                verification=rule,
                tree=tree_spec(tree),
                **self.request.proposer_options,
            )
            for name, tree in trees.items()
        ]
        self._measure("trees", [methods.plain(), *tried], self.trying)
        curves = {name: curve(rows) for name in trees if (rows := self._tried([name]))}
        # a tree whose engine stopped early says nothing about larger batches
        return {
            name: found
            for name, found in curves.items()
            if len(found.step_time) == len(self.request.batches)
        }

    def _tried(self, names: Sequence[str]) -> list[Row]:
        """The measurements of some methods in the phases before the last."""
        return [
            row
            for row in self.state.rows.values()
            if row.method in names and row.repetition in self.trying
        ]

    def _measure(self, phase: str, compared: list[methods.Method], repetitions: range) -> None:
        with progress_bar(self.console) as progress:
            task = progress.add_task(phase, total=None)
            interleaved = Interleaved(
                self.setup,
                compared,
                self.points,
                repetitions,
                known=list(self.state.rows.values()),
                report=lambda text: progress.update(task, description=f"{phase}: {text}"),
            )
            progress.update(task, total=interleaved.total)
            with closing(interleaved.measure()) as results:
                for result in results:
                    if isinstance(result, Failure):
                        self.console.print(f"{result.method} failed:\n{result.log}", markup=False)
                        continue
                    self.state.add(result)
                    progress.advance(task)
            progress.update(task, description=phase)
