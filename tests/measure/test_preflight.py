# SPDX-License-Identifier: Apache-2.0
"""Long commands check everything they need before a model is loaded or an engine starts."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import bench_e2e
import bench_kernels
import pytest
import torch
import transformers
import typer
from typer.testing import CliRunner

from helpers import vocabularies
from helpers.models import edited
from helpers.pair import DRAFT, PAIR, TARGET
from vllm_spechub.cli import _parse_tree_rules, app
from vllm_spechub.drafts.sources import Sources
from vllm_spechub.measure import preflight
from vllm_spechub.measure.benchmark import interleaved
from vllm_spechub.measure.benchmark.interleaved import Failure, Row
from vllm_spechub.measure.benchmark.methods import chain_config
from vllm_spechub.measure.preflight import parse_costs
from vllm_spechub.measure.tuning import rates
from vllm_spechub.measure.tuning.request import TuningRequest
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES

PROMPTS = str(PAIR / "prompts.jsonl")
SIMULATE = ["simulate", TARGET, DRAFT, "--prompts", PROMPTS]
SHAPE = ["shape", TARGET, DRAFT, "--prompts", PROMPTS]
EXPLAIN = ["explain", TARGET, DRAFT, "--prompt", "x"]
TUNE = ["tune", TARGET, "--draft", DRAFT, "--prompts", PROMPTS]
BENCH_E2E = ["bench_e2e", TARGET, "--draft", DRAFT, "--prompts", PROMPTS]
BENCH_KERNELS = ["bench_kernels", "--quick"]
MEASURE = rates.measure
COMMANDS = pytest.mark.parametrize(
    "arguments", [SIMULATE, SHAPE, EXPLAIN, TUNE, BENCH_E2E], ids=lambda a: a[0]
)


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch, tmp_path):
    """Fail where a model would be loaded, an engine started or a kernel measured."""

    def refuse(*_, **__):
        raise AssertionError("too late: the command has begun its work")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(rates, "measure", refuse)
    monkeypatch.setattr(interleaved, "EngineProcess", refuse)
    monkeypatch.setattr(bench_kernels, "copy_bandwidth", refuse)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


def run(arguments):
    """Run a command of the command line or a script's main function."""
    for script in (bench_e2e, bench_kernels):
        if arguments[0] == script.__name__:
            single = typer.Typer()
            single.command()(script.main)
            return CliRunner().invoke(single, arguments[1:])
    return CliRunner().invoke(app, arguments)


def assert_refused(arguments, message):
    done = run(arguments)
    assert done.exit_code == 2, done.output
    (line,) = done.output.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    "arguments",
    [[*SIMULATE, "--out", "study"], [*EXPLAIN, "--out", "x.png"], TUNE, BENCH_E2E, BENCH_KERNELS],
    ids=lambda arguments: arguments[0],
)
def test_a_plot_needs_matplotlib(monkeypatch, arguments):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert_refused(arguments, "pip install 'vllm-spechub[cli]'")


@pytest.mark.parametrize("arguments", [SIMULATE, BENCH_E2E, BENCH_KERNELS], ids=lambda a: a[0])
def test_an_output_folder_is_writable(tmp_path, arguments):
    (tmp_path / "file").touch()
    assert_refused([*arguments, "--out", "file/folder"], "--out file/folder cannot be written")


@pytest.mark.parametrize(
    ("arguments", "option", "file"),
    [
        (SHAPE, "--rates", "rates.json"),
        (EXPLAIN, "--out", "tree.png"),
        (EXPLAIN, "--out", "tree.html"),
        (TUNE, "--out", "tuned.json"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_an_output_file_has_a_folder(arguments, option, file):
    assert_refused([*arguments, option, f"missing/{file}"], f"{option} missing/{file} cannot")


def test_all_that_tune_writes_can_be_written(tmp_path):
    assert_refused([*TUNE, "--out", "tuned.csv"], "--out must end in .json, got 'tuned.csv'")
    (tmp_path / "tuned.png").mkdir()
    assert_refused([*TUNE, "--out", "tuned.json"], "--out tuned.png cannot be written: it is a")


@COMMANDS
def test_models_exist(tmp_path, arguments):
    no_model = [str(tmp_path) if argument == DRAFT else argument for argument in arguments]
    assert_refused(no_model, f"{str(tmp_path)!r} has no model")
    no_folder = ["./gone" if argument == TARGET else argument for argument in arguments]
    assert_refused(no_folder, "TARGET './gone' has no model: there is no such folder")


@pytest.mark.parametrize("config", ["[1]", '{"model_type": "llama", "vocab_size": "x"}'])
@pytest.mark.parametrize("role", [TARGET, DRAFT], ids=["target", "draft"])
def test_configurations_that_cannot_be_read(tmp_path, config, role):
    (tmp_path / "config.json").write_text(config)
    asked = [str(tmp_path) if argument == role else argument for argument in SHAPE]
    assert_refused(asked, f"{str(tmp_path)!r} has no model: ")


@COMMANDS
def test_heads_that_cannot_draft_trees(tmp_path, arguments):
    head = edited(tmp_path / "head", TARGET, architectures=["DFlashDraftModel"])
    asked = [head if argument == DRAFT else argument for argument in arguments]
    assert_refused(asked, f"{head!r} is a DFlash head (vLLM reads its configuration as DFlashDraft")


def test_mtp_layers_are_tuned_with_one_rule(tmp_path):
    layer = {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    model = edited(tmp_path / "mimo", TARGET, model_type="qwen2", **layer)
    asked = [model if argument in (TARGET, DRAFT) else argument for argument in TUNE]
    rules = ["--rule", "rrs", "--rule", "rrsw"]
    assert_refused([*asked, *rules], "--rule: a head that runs in engines only is measured with")


@COMMANDS
def test_models_are_found_as_the_engine_finds_them(hub, monkeypatch, arguments):
    """At its revisions, with its tokenizer, and with remote code only if it is trusted."""
    target = vocabularies.in_cache(hub, "made/target", TARGET, v2=[vocabularies.drop])
    tokenizer = vocabularies.in_cache(hub, "made/tokenizer", TARGET, v3=[])
    revisions = {"made/target": "v2", "made/tokenizer": "v3", DRAFT: None}
    asked = []
    for owner in (transformers.AutoConfig, transformers.AutoTokenizer):

        def from_pretrained(name, *args, load=owner.from_pretrained, **options):
            asked.append((name, options.get("revision"), options.get("trust_remote_code")))
            return load(name, *args, **options)

        monkeypatch.setattr(owner, "from_pretrained", from_pretrained)
    engine = {"revision": "v2", "tokenizer": tokenizer, "tokenizer_revision": "v3"}
    engine["trust_remote_code"] = True
    arguments = [target if argument == TARGET else argument for argument in arguments]
    assert_refused(arguments, "TARGET 'made/target' has no model")
    asked.clear()
    monkeypatch.setattr(preflight, "engine_refusals", lambda *_: {})
    done = run([*arguments, "--engine", json.dumps(engine)])
    assert str(done.exception).startswith("too late"), done.output
    assert {name for name, *_ in asked} == set(revisions)
    assert set(asked) == {(name, revisions[name], True) for name in revisions}


@pytest.mark.usefixtures("inspected_here")
def test_engines_are_checked_before_anything_is_measured():
    """Here the plugin refuses what plain vLLM takes."""
    engine = ["--engine", '{"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}']
    assert_refused([*TUNE, "--rule", "rrs", *engine], "spechub supplies its own scheduler; leave")


@pytest.mark.parametrize("folder", ["eagle-x", "my-Eagle3", "dflash", "dspark"])
def test_chains_whose_draft_vllm_takes_for_a_head(tmp_path, folder):
    """It goes by the path, whatever the method is."""
    (tmp_path / folder).symlink_to(DRAFT)
    chain = chain_config(Sources(TARGET, str(tmp_path / folder)), 2)
    refused = preflight.engine_refusals({"model": TARGET}, {"chain": chain})
    word = folder.removeprefix("my-").removesuffix("x").lower()
    assert f"for a head, because {word!r} is in its path" in refused["chain"]


def test_a_benchmark_goes_on_without_what_vllm_refuses(monkeypatch):
    monkeypatch.setattr(preflight, "engine_refusals", lambda *_: {"chain 2": "too long"})
    done = run([*BENCH_E2E, "-K", "2"])
    assert "without chain 2: too long" in done.output
    assert str(done.exception).startswith("too late")
    monkeypatch.setattr(preflight, "engine_refusals", lambda *_: {"SpecHub": "too wide"})
    done = run(BENCH_E2E)
    assert (done.exit_code, done.output.splitlines()[-1]) == (2, "error: too wide")


@COMMANDS
def test_a_proposer_is_no_draft(arguments):
    asked = ["ngram" if argument == DRAFT else argument for argument in arguments]
    assert_refused(asked, "is 'ngram', a proposer, but must name a draft model")


def test_a_configuration_to_compare_is_an_object():
    assert_refused([*BENCH_E2E, "--config", "mine=[3]"], "--config mine must be a JSON object")


@COMMANDS
def test_the_target_has_a_tokenizer(tmp_path, arguments):
    bare = Path(edited(tmp_path / "target", TARGET))
    vocabularies.drop(bare)
    without = [str(bare) if argument == TARGET else argument for argument in arguments]
    assert_refused(without, f"TARGET {str(bare)!r} has no tokenizer: Couldn't")
    shutil.rmtree(bare)
    # transformers makes up a tokenizer of one token
    edited(bare, TARGET, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    vocabularies.drop(bare)
    assert_refused(without, f"TARGET {str(bare)!r} has no tokenizer")


@COMMANDS
@pytest.mark.parametrize("edit", [vocabularies.exchange, vocabularies.add])
def test_the_pair_has_one_vocabulary(tmp_path, arguments, edit):
    """The engine would refuse it, after hours of `tune`."""
    foreign = Path(edited(tmp_path / "draft", DRAFT))
    edit(foreign)
    option = "--draft" if "--draft" in arguments else "DRAFT"
    arguments = [str(foreign) if argument == DRAFT else argument for argument in arguments]
    assert_refused(arguments, f"error: {option}: the draft's tokenizer differs from the target's")


@COMMANDS
def test_vocabularies_differ_by_padding_only(tmp_path, arguments):
    short = edited(tmp_path / "draft", DRAFT, vocab_size=1024)
    arguments = [short if argument == DRAFT else argument for argument in arguments]
    assert_refused(arguments, "the tokenizer's ids go up to 2047")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SIMULATE, "--tokens", "5000"], "--tokens is 5000, allowed: less than 1019"),
        ([*SHAPE, "--tokens", "5000"], "--tokens is 5000, allowed: less than 1019"),
        ([*EXPLAIN, "--steps", "9999"], "9999 steps need 39997 positions, the models read 1024"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_lengths_are_compared_with_the_configurations(arguments, message):
    assert_refused(arguments, message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it is there")
@pytest.mark.parametrize("arguments", [SIMULATE, SHAPE, EXPLAIN], ids=lambda a: a[0])
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu", "meta", "privateuseone"])
def test_the_device_is_there(arguments, device):
    assert_refused([*arguments, "--device", device], f"--device {device!r} cannot be used: ")


@pytest.mark.parametrize("sharpening", ["x", "", "1@2"])
@pytest.mark.parametrize("arguments", [SIMULATE, SHAPE], ids=lambda a: a[0])
def test_sharpening_is_a_number(arguments, sharpening):
    assert_refused(
        [*arguments, "--rule", f"ordered@{sharpening}"],
        f"--rule: 'ordered@{sharpening}': sharpening is {sharpening!r}, allowed: RULE@SHARPENING",
    )


@pytest.mark.parametrize("costs", [["4"], ["0=1"], ["2=x"], ["2=-1"], ["2=1", "2=3"]])
def test_costs_are_pairs_of_numbers(costs):
    options = [part for cost in costs for part in ("--step-cost", cost)]
    assert_refused([*SHAPE, *options], f"--step-cost is {costs[-1]!r}, allowed: ROWS=COST")


def test_costs_are_linear_in_between():
    cost = parse_costs("--step-cost", ["5=3", "1=1", "9=4"])
    assert [cost(rows) for rows in (1, 2, 3, 5, 7, 9, 40)] == [1, 1.5, 2, 3, 3.5, 4, 4]


@pytest.mark.parametrize("arguments", [TUNE, BENCH_E2E], ids=lambda a: a[0])
def test_prompts_and_engine_options_are_read(tmp_path, arguments):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "?"}\n')
    assert_refused([str(bad) if a == PROMPTS else a for a in arguments], "line 1: no `turns`")
    for engine, message in (
        ("dtype=float32", "--engine must be a JSON object"),
        ("[1]", "--engine must be a JSON object"),
        ("[" * 10000, "--engine must be a JSON object"),
        ('{"dtipe": "float32"}', "--engine has 'dtipe', which vLLM does not know"),
        ('{"model": "x"}', "--engine has 'model', which the command gives itself; leave it out"),
        ('{"hf_overrides": 3}', "--engine has 'hf_overrides': 3, allowed: an object"),
    ):
        assert_refused([*arguments, "--engine", engine], message)


def test_what_vllm_refuses_is_named():
    wrong = '{"max_model_len": "long"}'
    assert_refused([*TUNE, "--engine", wrong], "max_model_len: Input should be a valid integer")


@pytest.mark.parametrize("arguments", [SIMULATE, SHAPE, EXPLAIN], ids=lambda a: a[0])
def test_options_of_engines_that_do_not_run(arguments):
    message = "--engine has 'dtype', allowed here, where no engine runs: tokenizer, tokenizer_r"
    assert_refused([*arguments, "--engine", '{"dtype": "float32"}'], message)
    trusted = '{"trust_remote_code": "maybe"}'
    message = "--engine has 'trust_remote_code': 'maybe', allowed: true or false"
    assert_refused([*arguments, "--engine", trusted], message)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("best", "--rule is 'best', allowed: traversal"),
        ("chain", "--rule is 'chain', allowed: traversal"),
        ("ordered@2", "--rule is 'ordered@2', allowed: traversal"),
    ],
)
def test_rules_to_tune_draft_trees(rule, message):
    assert_refused([*TUNE, "--rule", rule], message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", "caf\udce9"), "--prompt must be text in UTF-8"),
        (("--rule", "mixed@2"), "--rule is 'mixed@2', allowed: traversal"),
        (("--rule", "chain"), "rule 'chain' takes one child per node"),
    ],
)
def test_what_explain_shows_is_checked(options, message):
    assert_refused([*EXPLAIN, *options], message)


def test_seeds_that_no_generator_takes():
    done = run([*SHAPE, "--seed", str(2**32)])
    assert (done.exit_code, "too late" in repr(done.exception)) == (2, False)


@pytest.mark.parametrize("tree", ["[0, 0", "[" * 10000])
def test_a_tree_that_is_no_json(tree):
    assert_refused([*EXPLAIN, "--tree", tree], f"{tree!r} is not a tree, allowed: binary:DEPTH")


def test_match_is_tuned_only_if_it_is_named():
    """It is for a seed's text, and cannot win by speed."""
    assert _parse_tree_rules(None) == tuple(
        name for name in BUILTIN_RULES if name not in ("chain", "match")
    )
    assert _parse_tree_rules(["match"]) == ("match",)
    # one whose draws may be equal drafts no trees by level widths
    assert set(_parse_tree_rules(None)) - set(_parse_tree_rules(None, levels=True)) == {"rrs"}
    with pytest.raises(ValueError, match="--rule is 'rrs', allowed: traversal, mixed"):
        _parse_tree_rules(["rrs"], levels=True)


def test_schedules_can_be_kept(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "file"))
    assert_refused(TUNE, "VLLM_CACHE_ROOT")


def test_another_versions_state_file_is_refused(tmp_path):
    (tmp_path / "spechub-tuned.state.json").write_text('{"rows": [{"method": "plain"}]}')
    assert_refused(TUNE, "not a state file of this version")


def test_the_extra_is_named_where_it_is_missing():
    hide = "import sys; sys.modules['typer'] = None; import vllm_spechub.cli"
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line == "vllm-spechub needs typer: pip install 'vllm-spechub[cli]'"
    assert "Traceback" not in done.stderr


def test_an_interrupted_benchmark_keeps_its_rows(monkeypatch, tmp_path):
    class Interrupted:
        total = 2

        def __init__(self, *_, **__):
            pass

        def measure(self):
            yield Failure("chain 1", "out of memory")
            yield Row("plain", 1.0, 1, 0, 10.0, 1.0, 1.0, 1.0, 1.0, 0, (), 1.0)
            raise KeyboardInterrupt

    monkeypatch.setattr(bench_e2e, "Interleaved", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench_e2e.measure(None, [], [], 1, tmp_path / "rows.csv")
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert lines[-1].startswith("plain,1,1,0,10,")
    assert lines[-2].startswith("method,temperature,")


def refused_measurement(request):
    rates._progress.send(("texts", 1, 2))
    raise ValueError("the models do not fit together")


def killed_measurement(request):
    os.kill(os.getpid(), 9)


def endless_measurement(request):
    rates._progress.send(("texts", 1, 2))
    time.sleep(600)


@pytest.fixture
def measure(monkeypatch):
    """Measure acceptance with another function in the place of `_measure`."""
    monkeypatch.undo()
    request = TuningRequest(Sources("", ""), Path(), None, (), 1.0, (), (), (), 1, 1, 1)

    def measure(function, progress):
        monkeypatch.setattr(rates, "_measure", function)
        return rates.measure(request, progress)

    return measure


def test_errors_of_the_measuring_process_arrive(measure):
    reports = []
    with pytest.raises(ValueError, match="do not fit"):
        measure(refused_measurement, lambda *report: reports.append(report))
    assert reports == [("texts", 1, 2)]
    with pytest.raises(ChildProcessError, match="was killed, usually for lack of memory; free"):
        measure(killed_measurement, lambda *report: None)


def test_a_measuring_process_that_is_killed_takes_one_line(monkeypatch):
    monkeypatch.setattr(preflight, "engine_refusals", lambda *_: {})
    monkeypatch.setattr(rates, "measure", MEASURE)
    monkeypatch.setattr(rates, "_measure", killed_measurement)
    done = run(TUNE)
    assert done.exit_code == 1
    line = done.output.splitlines()[-1]
    assert line.startswith("error: the process that measures acceptance was killed, usually for la")


def test_an_interrupt_stops_the_measuring_process(measure):
    def interrupt(*report):
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        measure(endless_measurement, interrupt)
    assert time.monotonic() - start < 60
