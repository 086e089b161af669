# SPDX-License-Identifier: Apache-2.0
"""Tuning: choices from made-up measurements, continuing after an interrupt, and the files."""

import json
from collections import deque
from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from helpers.engines import engine
from helpers.metrics import spec_metrics
from helpers.oracle import tokens_of
from helpers.pair import DRAFT, EAGLE3, NESTED, PAIR, PROMPTS, TARGET
from vllm_spechub.cli import app
from vllm_spechub.drafts.kinds import MODEL
from vllm_spechub.drafts.sources import Sources
from vllm_spechub.measure.benchmark import interleaved
from vllm_spechub.measure.benchmark.decoding import Decoded
from vllm_spechub.measure.benchmark.engine import EngineFailed
from vllm_spechub.measure.benchmark.interleaved import Interleaved, Point, Row, Setup, groups
from vllm_spechub.measure.benchmark.methods import chain_config, plain, spechub
from vllm_spechub.measure.tuning import rates, report
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
from vllm_spechub.measure.tuning.run import Tuned, tree_spec
from vllm_spechub.measure.tuning.state import State
from vllm_spechub.trees import measured_schedule as store
from vllm_spechub.trees.level_tree import LevelTree
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels.rules import rates_of


def row(method="x", batch=1, repetition=0, gain=1.0, drafts=10, accepted=(), temperature=1.0):
    emitted = 1 + sum(accepted) / drafts
    return Row(
        method, temperature, batch, repetition, 100 * gain, gain, 10.0, 5.0, emitted, drafts,
        tuple(accepted), 1.0,
    )  # fmt: skip


def test_a_curve_pools_acceptance_and_not_time():
    rows = [
        row(batch=1, gain=2.0, drafts=10, accepted=(10, 10)),  # 3 tokens, a step takes 1.5
        row(batch=8, gain=1.0, drafts=30, accepted=(15, 0)),  # 1.5 tokens, a step takes 1.5
    ]
    found = curve(rows)
    assert found.tokens_per_step == pytest.approx(1 + 35 / 40)
    assert found.step_time == pytest.approx({1: 1.5, 8: 1.5})
    assert found.gain(4) == pytest.approx((1 + 35 / 40) / 1.5)


def test_chains_between_those_that_were_measured():
    rows = [row("chain 1", gain=1.6 / 1.2, drafts=20, accepted=(12,))]
    rows += [row("chain 4", gain=2.3 / 1.8, drafts=10, accepted=(6, 4, 2, 1))]
    curves = chain_curves(rows, (1, 4))
    assert list(curves) == [1, 2, 3, 4]
    assert curves[2].tokens_per_step == pytest.approx(1 + 0.6 + 0.4)
    assert curves[4].tokens_per_step == pytest.approx(2.3)
    assert curves[2].step_time[1] == pytest.approx(1.4)
    assert draft_costs(curves)[1] == pytest.approx(0.2)


RATES = {1: [0.7], 2: [0.7, 0.2], 3: [0.7, 0.2, 0.05]}


def test_levels_that_cost_more_make_flatter_trees():
    (deep,) = candidate_trees(RATES, [8], [0.0])
    (flat,) = candidate_trees(RATES, [8], [0.5])
    assert deep.num_nodes == flat.num_nodes == 8
    assert deep.depth > flat.depth


def test_candidates_differ_in_their_number_of_nodes():
    trees = candidate_trees(RATES, [2, 8, 32], [0.05, 0.5])
    sizes = [tree.num_nodes for tree in trees]
    assert len(trees) > 3
    assert len(set(sizes)) == len(sizes)


def test_nodes_and_levels_are_priced_apart():
    """Where nodes cost time, a chain makes levels look dear, and the candidates too flat."""
    specs = ("chain:1", "kary:4:1", "binary:2", "binary:3")
    trees = {spec: TokenTree.parse(spec) for spec in specs}
    curves = {
        spec: at(2.0, b1=1.3 + 0.02 * tree.depth + 0.1 * tree.num_nodes, b8=1.0 + 0.05 * tree.depth)
        for spec, tree in trees.items()
    }
    prices = measured_prices(trees, curves)
    assert prices[1] == pytest.approx((0.02, 0.1))
    assert prices[8] == pytest.approx((0.05, 0.0))
    too_few = {spec: curves[spec] for spec in specs[:2]}
    assert measured_prices(trees, too_few) == {}

    flat = candidate_trees(RATES, [8], [0.12])  # the slope of chains
    (deeper,) = candidate_trees(RATES, [8], [prices[1].level], flat)
    assert deeper.depth > flat[0].depth
    assert deeper.num_nodes != flat[0].num_nodes  # as a schedule needs it
    assert candidate_trees(RATES, [8], [0.12], flat) == []


def test_a_mixture_of_experts_drafts_nothing_for_few_requests():
    curves = {"chain": at(1.6, b1=1.8, b8=1.5, b64=1.1), "wide": at(2.8, b1=4.0, b8=2.9, b64=1.2)}
    (nothing, *_, wide, end) = choose(curves, 64)
    assert nothing[0] == 1
    assert nothing[2] is None
    assert wide[1:] == (64, "wide")
    assert end == (65, None, None)


def test_of_two_trees_of_one_size_the_faster_is_kept():
    """A schedule cannot hold both."""
    trees = {"static": TokenTree.complete(2, 3), "levels": LevelTree((3, 5, 6))}
    trees |= {"narrow": TokenTree.chain(2)}
    curves = {"static": at(3.0, b1=1.5, b8=2.0), "narrow": at(2.0, b1=1.2, b8=1.4)}
    assert set(distinct_sizes(trees, curves)) == {"static", "narrow"}
    faster, slower = at(3.2, b1=1.5, b8=2.1), at(3.2, b1=1.5, b8=2.4)
    assert set(distinct_sizes(trees, curves | {"levels": faster})) == {"levels", "narrow"}
    assert set(distinct_sizes(trees, curves | {"levels": slower})) == {"static", "narrow"}


def at(tokens_per_step, **step_time):
    return Curve(tokens_per_step, {int(k[1:]): v for k, v in step_time.items()})


def test_wide_trees_for_few_requests_and_none_for_many():
    curves = {
        "wide": at(3.0, b1=1.5, b16=4.0, b64=9.0),
        "narrow": at(2.0, b1=1.2, b16=1.4, b64=2.1),
    }
    # wide: 3 / (1.5 + (b - 1) / 6), narrow: 2 / (1.2 + (b - 1) / 75), until 16
    crossing = next(
        b for b in range(1, 17) if 2 / (1.2 + (b - 1) / 75) > 1.02 * 3 / (1.5 + (b - 1) * 2.5 / 15)
    )
    ranges = choose(curves, 64)
    assert ranges[0] == (1, crossing - 1, "wide")
    assert ranges[1][::2] == (crossing, "narrow")
    # 2 / (1.4 + (b - 16) 0.7 / 48) falls below 1 after 57
    assert ranges[1:] == [(crossing, 57, "narrow"), (58, None, None)]


def test_nothing_is_drafted_where_nothing_is_gained():
    assert choose({"x": at(2.0, b1=1.97, b8=2.5)}, 8) == [(1, None, None)]
    # .. nor beyond what was measured
    assert choose({"x": at(2.0, b1=1.5, b8=1.5)}, 8) == [(1, 8, "x"), (9, None, None)]


def test_neighbours_within_the_margin_are_one_range():
    curves = {"x": at(2.0, b1=1.0, b8=1.02), "y": at(2.0, b1=1.02, b8=1.01)}
    assert choose(curves, 8) == [(1, 8, "x"), (9, None, None)]


def test_the_default_rule_stays_unless_another_is_clearly_better():
    assert rates.best_rule({"traversal": 3.0, "rrsw": 3.02}, "traversal") == "traversal"
    assert rates.best_rule({"traversal": 3.0, "rrsw": 3.1}, "traversal") == "rrsw"
    assert rates.best_rule({"rrs": 3.0}, "traversal") == "rrs"


class FakeEngine:
    """Replaces an engine's process: it decodes nothing, and is interrupted after some calls.
    Trees by level widths are fast."""

    started: list[str]
    calls: list[tuple]
    stop_after: int
    broken: str

    def __init__(self, options, log):
        config = options["speculative_config"]
        self.name = "plain" if config is None else config.get("title", config["method"])
        self.fast = config is not None and "levels:" in str(config.get("tree"))
        self.started.append(self.name)

    def wait(self):
        if self.name == self.broken:
            raise EngineFailed("out of memory")

    def call(self, function, prompts, batch, temperature, tokens):
        if len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((self.name, batch))
        seconds = 0.8 if self.fast else 2.0 if self.name == "plain" else 1.0
        return Decoded(batch, 100 * batch, seconds, 50, 50, (25,), 1)

    def ask_to_stop(self):
        pass

    join = ask_to_stop


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(interleaved, "EngineProcess", FakeEngine)
    for name, value in {"started": [], "calls": [], "stop_after": -1, "broken": ""}.items():
        monkeypatch.setattr(FakeEngine, name, value, raising=False)
    return FakeEngine


METHODS = [plain(), *(spechub(name, DRAFT, title=name) for name in ("a", "b", "c"))]
SETUP = Setup(Sources(TARGET, DRAFT), [[1, 2, 3]], tokens=8, resident=3)


def interleaved_runs(known=(), repetitions=2):
    return Interleaved(SETUP, METHODS, [Point(1, 1.0), Point(4, 1.0)], range(repetitions), known)


def test_plain_vllm_takes_turns_with_every_group(fake):

    def names(resident):
        return [[method.name for method in group] for group in groups(METHODS, resident)]

    assert names(3) == [["plain", "a", "b"], ["plain", "c"]]
    assert names(1) == [["plain"], ["a"], ["b"], ["c"]]
    rows = list(interleaved_runs(repetitions=1).measure())
    assert fake.started == ["plain", "a", "b", "c"]
    assert [name for name, *_ in fake.calls] == ["plain", "a", "b"] * 2 + ["plain", "c"] * 2
    assert all(r.against_plain == (1.0 if r.method == "plain" else 2.0) for r in rows)


def test_each_repetition_goes_on_with_other_prompts(fake, monkeypatch):
    first, call = [], fake.call

    def spy(self, function, prompts, *arguments):
        first.append(prompts[0][0])
        return call(self, function, prompts, *arguments)

    monkeypatch.setattr(fake, "call", spy)
    setup = replace(SETUP, prompts=[[1], [2], [3]])
    deque(Interleaved(setup, METHODS[:2], [Point(2, 1.0)], range(3)).measure())
    assert first == [1, 1, 3, 3, 2, 2]


def test_an_engine_that_fails_is_reported_and_the_others_go_on(fake):
    fake.broken = "b"
    found = list(interleaved_runs().measure())
    (failure,) = (f for f in found if isinstance(f, interleaved.Failure))
    assert (failure.method, failure.log) == ("b", "out of memory")
    assert {f.method for f in found} == {"plain", "a", "b", "c"}
    fake.broken = "plain"
    with pytest.raises(EngineFailed):
        list(interleaved_runs().measure())


def test_what_was_measured_before_an_interrupt_is_not_measured_again(fake, tmp_path):
    state = State.load(tmp_path / "state.json", {"nodes": (2, 4)})
    fake.stop_after = 8
    with pytest.raises(KeyboardInterrupt):
        deque(map(state.add, interleaved_runs().measure()))
    fake.calls[:], fake.stop_after = [], -1

    again = State.load(tmp_path / "state.json", {"nodes": (2, 4)})
    assert list(again.rows.values()) == list(state.rows.values())
    assert len(again.rows) == 8
    rest = interleaved_runs(list(again.rows.values()))
    assert rest.total == len(list(rest.measure()))
    # plain vLLM is measured anew beside what was missing
    missing = [("plain", 1), ("b", 1), ("plain", 4), ("a", 4), ("b", 4)]
    missing += [("plain", 1), ("c", 1), ("plain", 4), ("c", 4)] * 2
    assert fake.calls == missing
    for found in rest.measure():
        again.add(found)
    assert interleaved_runs(list(again.rows.values())).total == 0
    with pytest.raises(ValueError, match=r"other settings \(nodes was \[2, 4\], is \[3\]\)"):
        State.load(tmp_path / "state.json", {"nodes": (3,)})


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    trees = {"wide": TokenTree((0, 0, 1, 1, 3)), "narrow": TokenTree.chain(2)}
    curves = {"wide": at(2.5, b1=1.5, b4=2.4), "narrow": at(2.0, b1=1.5, b4=1.6)}
    schedule = [[1, 2, tree_spec(trees["wide"])], [3, 4, tree_spec(trees["narrow"])]]
    schedule.append([5, None, None])
    ranges = [(1, 2, "wide"), (3, 4, "narrow"), (5, None, None)]
    chains = {1: at(1.6, b1=1.4, b4=1.5), 2: at(2.0, b1=1.6, b4=1.8)}
    checked = [row("tuned", b, 1, gain=1.5, accepted=(9,)) for b in (1, 4)]
    checked += [row("chain 2", b, 1, gain=1.2, accepted=(9,)) for b in (1, 4)]
    plain_speed = {1: 50.0, 4: 180.0}
    return Tuned("traversal", schedule, trees, curves, chains, ranges, plain_speed, checked)


def test_the_engine_accepts_what_is_written(tuned):
    load_general_plugins()
    config = json.loads(json.dumps(report.speculative_config(tuned, DRAFT)))
    trees = [[1, 2, [0, 0, 1, 1, 3]], [3, 4, "chain:2"], [5, None, None]]
    assert config["tree_by_batch_size"] == trees
    engine = EngineArgs(model=TARGET, dtype="float32", speculative_config=config)
    spec = engine.create_engine_config().speculative_config
    assert [tree.num_nodes for tree in spec.schedule.trees] == [5, 2]
    assert spec.verification == "traversal"


def test_table_and_plot(tuned, tmp_path):
    console = Console(record=True, width=120)
    console.print(report.table(tuned))
    text = console.export_text()
    assert "narrow" in text
    assert "1.67" in text  # predicted for one request: 2.5 / 1.5
    assert "1.50-1.50" in text
    assert "2: 1.20" in text
    report.plot(tuned, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_schedules_are_kept_for_pair_rule_and_machine(tuned, monkeypatch):
    with pytest.raises(ValueError, match=r"vllm-spechub tune .* --prompts FILE") as refusal:
        store.measured_schedule(TARGET, DRAFT, MODEL, "rrsw")
    assert "--rule rrsw" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    store.keep(TARGET, DRAFT, MODEL, "traversal", tuned.schedule)
    monkeypatch.chdir(PAIR)
    assert store.measured_schedule("target", "draft", MODEL, "traversal") == tuned.schedule
    for other in (
        ("target", "target", MODEL, "traversal"),
        ("target", "draft", "eagle3", "traversal"),
        ("target", "draft", MODEL, "rrsw"),
    ):
        with pytest.raises(ValueError, match="no schedule was measured"):
            store.measured_schedule(*other)
    store.keep(TARGET, DRAFT, MODEL, "rrs", [[1, None, None]])
    with pytest.raises(ValueError, match="leave speculation off"):
        store.measured_schedule(TARGET, DRAFT, MODEL, "rrs")
    monkeypatch.setattr(store, "device_name", lambda: "another")
    with pytest.raises(ValueError, match="on another with"):
        store.measured_schedule(TARGET, DRAFT, MODEL, "traversal")


def test_a_heads_acceptance_is_counted_in_engines(fake, monkeypatch, tmp_path):
    """The slots of complete trees, one engine for each number of children."""
    monkeypatch.setattr(rates, "EngineProcess", fake)
    trees, slots = [], {1: [60], 2: [70, 15], 3: [70, 15, 5], 4: [70, 15, 5, 0]}

    def call(self, function, depth, *arguments):
        assert function is rates.accepted_by_slot
        return 100, slots[len(trees)]

    def start(self, options, log):
        assert options["speculative_config"]["verification"] == rates_of("traversal")
        trees.append(options["speculative_config"]["tree"])
        self.name = trees[-1]

    monkeypatch.setattr(fake, "call", call)
    monkeypatch.setattr(fake, "__init__", start)
    sources = Sources(TARGET, EAGLE3)
    request = TuningRequest(
        sources, PAIR / "prompts.jsonl", None, ("traversal",), 1.0, (4,), (1,), (1, 4), 2, 8, 1
    )
    setup = Setup(sources, [[1, 2, 3]], tokens=8)
    measured = rates.measure_head(setup, request, lambda text: None)
    assert trees == [f"kary:{k}:{depth}" for k, depth in rates.COMPLETE_TREES.items()]
    by_slot = rates.rates_for_trees(measured.rates, "traversal")
    assert by_slot == {k: [count / 100 for count in counts] for k, counts in slots.items()}
    assert rates.best_rule(measured.tokens_per_step, "traversal") == "traversal"
    # and its chain is vLLM's own for such heads
    assert chain_config(sources, 3)["method"] == "eagle3"


def test_slots_of_a_real_engine():
    with engine(
        "kary:2:2",
        draft=EAGLE3,
        verification="traversal",
        worker_extension_cls="vllm_spechub.measure.benchmark.worker.Observed",
        max_model_len=512,
    ) as llm:
        prompts = [tokens_of(prompt) for prompt in PROMPTS]
        verified, accepted = rates.accepted_by_slot(llm, 2, prompts, 4, 1.0, 16)
        metrics = spec_metrics(llm)
    first, second, *_ = metrics["num_accepted_tokens_per_pos"]
    assert verified == metrics["num_drafts"] + first
    assert sum(accepted) == first + second
    assert len(accepted) == 2
    assert accepted[0] > accepted[1] > 0


@pytest.mark.parametrize(("draft", "kind"), [(DRAFT, MODEL), (EAGLE3, "eagle3")])
@pytest.mark.usefixtures("inspected_here")
def test_tune_from_end_to_end(draft, kind, fake, monkeypatch, tmp_path):
    """All phases on the demo pair; acceptance is real, engines are not. With the head, level widths
    are tried, too."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    out = tmp_path / "tuned.json"
    arguments = ["tune", TARGET, "--draft", draft, "--prompts", str(PAIR / "prompts.jsonl")]
    arguments += ["--limit", "2", "--texts", "2", "--tokens", "8", "-n", "2", "-n", "9"]
    arguments += ["-K", "1", "-K", "2", "-b", "1", "-b", "4", "--repetitions", "1"]
    arguments += ["--rule", "ordered", "--out", str(out), *["--levels"] * (draft == EAGLE3)]
    fake.stop_after = 7
    stopped = CliRunner().invoke(app, arguments)
    assert stopped.exit_code == 130, stopped.output
    assert "continues from" in stopped.output
    first, fake.calls[:], fake.stop_after = list(fake.calls), [], -1
    monkeypatch.setattr(rates, "measure", None)  # it is known by now
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    config = json.loads(out.read_text())
    assert config["verification"] == "ordered"
    assert config["tree_by_batch_size"] == store.measured_schedule(TARGET, draft, kind, "ordered")
    state = json.loads(out.with_suffix(".state.json").read_text())
    assert bool(state["widths"]) == (draft == EAGLE3)
    (first_tree, *_) = (tree for *_, tree in config["tree_by_batch_size"])
    assert str(first_tree).startswith("levels:") == (draft == EAGLE3)
    for levels in map(LevelTree.parse, state["widths"].values()):
        size = levels.num_nodes, levels.depth
        assert store.measured_widths(TARGET, draft, "ordered", *size) == levels
        assert str(levels) in {row["method"] for row in state["rows"]}
    # two chains at two batches, of which the better one is measured again beside the schedule
    assert [name for name, _ in first].count(kind) == 4
    assert [name for name, _ in fake.calls].count(kind) == 2

    # results are written even if the plot cannot be drawn
    out.unlink()
    out.with_suffix(".csv").unlink()
    monkeypatch.setattr(report, "plot", None)
    assert isinstance(CliRunner().invoke(app, arguments).exception, TypeError)
    assert json.loads(out.read_text()) == config
    assert "method,temperature," in out.with_suffix(".csv").read_text()


def test_tune_chooses_a_depth_of_the_draft(fake, monkeypatch, tmp_path):
    """Acceptance and engines are made up: after six layers a step is faster."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    by_children = {"1": [0.6], "2": [0.6, 0.2], "3": [0.6, 0.2, 0.1], "4": [0.6, 0.2, 0.1, 0.0]}
    measured, start, call = [], fake.__init__, fake.call

    def measure(request, progress):
        measured.append(request.draft_layers)
        return rates.Measurement({"ordered": by_children}, {"ordered": 2.0})

    def keep_depth(self, options, log):
        start(self, options, log)
        self.layers = (options["speculative_config"] or {}).get("draft_layers")

    def slower(self, *arguments):
        found = call(self, *arguments)
        return replace(found, seconds=found.seconds * (1.5 if self.layers == 12 else 1))

    monkeypatch.setattr(rates, "measure", measure)
    monkeypatch.setattr(fake, "__init__", keep_depth)
    monkeypatch.setattr(fake, "call", slower)
    out = tmp_path / "tuned.json"
    arguments = ["tune", TARGET, "--draft", NESTED, "--prompts", str(PAIR / "prompts.jsonl")]
    arguments += ["--limit", "1", "-n", "2", "-K", "1", "-b", "1", "-b", "4", "--repetitions", "1"]
    arguments += ["--rule", "ordered", "--draft-layers", "12,6", "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert measured == [6, 12]
    config = json.loads(out.read_text())
    assert config["draft_layers"] == store.measured_layers(TARGET, NESTED) == 6
    of_depth = TARGET, NESTED, MODEL, "ordered", {"draft_layers": 6}
    assert config["tree_by_batch_size"] == store.measured_schedule(*of_depth)
    refused = CliRunner().invoke(app, [*arguments[:-4], "--draft-layers", "6,13"])
    assert "--draft-layers is '6,13', allowed: numbers from 1 to 12" in refused.output
