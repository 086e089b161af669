# SPDX-License-Identifier: Apache-2.0
"""What `--speculative-config` accepts and refuses, before any weights are loaded."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.config import ParallelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

from helpers import models
from helpers.pair import DRAFT, EAGLE3, EXIT_TARGET, NESTED, ROOT, TARGET
from vllm_spechub.config import Options, SpecHubConfig
from vllm_spechub.config import _schedule as schedule_of
from vllm_spechub.drafts.kinds import MODEL
from vllm_spechub.integration.refusals import Unsupported
from vllm_spechub.registry import PROPOSERS, RULES, TARGETS, Registry
from vllm_spechub.rules.base import build_rule
from vllm_spechub.rules.kernel_rule import PORTABLE_KERNELS
from vllm_spechub.trees.best_tree import parse_tree
from vllm_spechub.trees.level_tree import LevelTree
from vllm_spechub.trees.measured_schedule import keep, keep_widths
from vllm_spechub.trees.schedule import TreeSchedule
from vllm_spechub.trees.tree import TokenTree


@pytest.fixture(autouse=True, scope="module")
def _plugin():
    load_general_plugins()  # as vLLM's command line does before it builds its parser


def from_command_line(*arguments: str):
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--model", TARGET, "--dtype", "float32", *arguments])
    return EngineArgs.from_cli_args(args).create_engine_config()


def configured(spec=None, **options):
    options = {"model": TARGET, "dtype": "float32", **options}
    spec = {"method": "spechub", "model": DRAFT} | (spec or {})
    return EngineArgs(**options, speculative_config=spec).create_engine_config()


JSON = json.dumps({"method": "spechub", "model": DRAFT, "tree": "binary:3"})


def test_the_reference_has_every_option_and_name():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    part = page.partition("## The options\n")[2].partition("\n## ")[0]
    lists = re.findall(r"^(?:### |\| )(`\w+`(?:, `\w+`)*)", part, re.MULTILINE)
    listed = [name.strip("`") for names in lists for name in names.split(", ")]
    declared = {key for name in PROPOSERS._builtin for key in PROPOSERS.load(name).options}
    assert sorted(listed) == sorted({*Options.model_fields, *declared})
    for registry in (RULES, PROPOSERS, TARGETS):
        assert all(f"`{name}`" in part for name in registry._builtin)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--speculative-config", "spechub", "--spec-model", DRAFT),
        ("--speculative-config", JSON),
        ("--spec-method", "spechub", "--spec-model", DRAFT),
        ("-sc", "spechub", "--spec-model", DRAFT, "--spec-method", "spechub"),
    ],
)
def test_every_command_line_form(arguments):
    config = from_command_line(*arguments)
    spec = config.speculative_config
    assert isinstance(spec, SpecHubConfig)
    assert (spec.num_speculative_tokens, spec.tree.depth) == (14, 3)
    assert (spec.verification, spec.proposer) == ("traversal", "draft_model")
    assert config.use_v2_model_runner
    assert config.parallel_config.worker_cls.startswith("vllm_spechub.")


def test_the_best_tree_for_a_budget():
    """Without vLLM it is tested in test_shapes.py; here, that the rule's own shape arrives."""
    for rule, tree in (("ordered", "auto"), ("unordered", "auto:7:3")):
        spec = configured({"tree": tree, "verification": rule}).speculative_config
        assert spec.tree == parse_tree(tree, rule)
        assert spec.num_speculative_tokens == spec.tree.num_nodes
    assert spec.tree != parse_tree(tree, "ordered")


def test_trees_by_batch_size():
    ranges = [[1, 8, "binary:3"], [9, 32, "auto:7"], [33, 128, "chain:2"], [129, None, None]]
    spec = configured({"tree_by_batch_size": ranges}).speculative_config
    assert spec.schedule == TreeSchedule.parse(ranges, spec.verification)
    assert spec.tree == TokenTree.parse("binary:3")
    assert spec.num_speculative_tokens == 14
    # what vLLM's own scheduler and graphs go by
    by_size = build_dynamic_sd_schedule_lookup(spec.num_speculative_tokens_per_batch_size, 200, 14)
    narrow = parse_tree("auto:7", spec.verification).num_nodes
    assert [by_size[n] for n in (1, 8, 9, 32, 33, 128, 129, 200)] == (
        [14, 14, narrow, narrow, 2, 2, 0, 0]
    )


def test_a_measured_schedule(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    with pytest.raises(ValueError, match=r"no schedule was measured .* `vllm-spechub tune .*` mea"):
        configured({"tree_by_batch_size": "auto"})
    ranges = [[1, 4, "binary:3"], [5, None, None]]
    keep(TARGET, DRAFT, MODEL, "traversal", ranges)
    spec = configured({"tree_by_batch_size": "auto"}).speculative_config
    assert spec.schedule == TreeSchedule.parse(ranges, "traversal")
    with pytest.raises(ValueError, match="no schedule was measured for this pair with 'ordered'"):
        configured({"tree_by_batch_size": "auto", "verification": "ordered"})


def test_measured_level_widths(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    asked = {"tree": "levels:auto:9:3", "verification": "mixed"}
    remedy = r"`vllm-spechub shape .* --levels --rule mixed --nodes 9 --depth 3 --prompts FILE` mea"
    with pytest.raises(ValueError, match=remedy) as refusal:
        configured(asked)
    assert (
        str(refusal.value).count("speculative_config['tree']: no widths of 9 nodes and 3 lev") == 1
    )
    keep_widths(TARGET, DRAFT, "mixed", 9, 3, LevelTree((2, 4, 3)))
    assert str(configured(asked).speculative_config.tree) == "levels:2,4,3"
    ranges = [[1, 4, "levels:auto:9:3"], [5, None, None]]
    spec = configured({"tree_by_batch_size": ranges, "verification": "mixed"}).speculative_config
    assert spec.schedule.trees == (LevelTree((2, 4, 3)),)
    for other in (
        {"tree": "levels:auto:9:2"},
        {"verification": "ordered"},
        {"tree_by_batch_size": [[1, None, "levels:auto:8:3"]], "tree": None},
    ):
        other = {key: value for key, value in (asked | other).items() if value}
        with pytest.raises(ValueError, match=r"speculative_config\['tree.*: no widths of"):
            configured(other)
    # of some of a draft's layers
    nested = asked | {"model": NESTED, "draft_layers": 3}
    with pytest.raises(ValueError, match=r"tune .* --levels --draft-layers 3 --rule mixed"):
        configured(nested)
    keep_widths(TARGET, NESTED, "mixed", 9, 3, LevelTree((3, 3, 3)), {"draft_layers": 3})
    assert str(configured(nested).speculative_config.tree) == "levels:3,3,3"
    with pytest.raises(ValueError, match="measured for a draft; give levels:WIDTH"):
        configured(asked | {"proposer": "ngram", "model": None})


def test_one_range_is_a_constant_tree():
    spec = configured({"tree_by_batch_size": [[1, None, "chain:2"]]}).speculative_config
    assert spec.schedule == configured({"tree": "chain:2"}).speculative_config.schedule
    assert not spec.uses_dynamic_speculative_decoding()


def test_survives_pickling_into_a_fresh_process():
    config = configured({"tree": [0, 0, 1]})
    program = (
        "import pickle, sys; c = pickle.load(sys.stdin.buffer); "
        "from vllm.plugins import load_general_plugins; load_general_plugins(); "
        "print(c.speculative_config, c.use_v2_model_runner)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(config), capture_output=True, check=True
    )
    last = found.stdout.decode().strip().splitlines()[-1]
    assert "tree=[0, 0, 1]" in last
    assert last.endswith("True")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"model": None}, "speculative_config['model'] is missing"),
        ({"model": "/nowhere/draft"}, "there is no folder '/nowhere/draft'"),
        (
            {"tree": "oak:3"},
            "speculative_config['tree']: 'oak:3' is not a tree, allowed: binary:DEPTH",
        ),
        ({"tree": [0, 2]}, "speculative_config['tree']: parents[1] = 2"),
        (
            {"tree": "chain:2", "tree_by_batch_size": [[1, None, "chain:2"]]},
            "speculative_config['tree'] and speculative_config['tree_by_batch_size'] exclude",
        ),
        (
            {"tree_by_batch_size": [[1, 4, "chain:2"], [6, None, None]]},
            "speculative_config['tree_by_batch_size']: range 2 starts at 6, it must start at 5",
        ),
        (
            {"tree_by_batch_size": [[1, None, "chain:3"]], "verification": "maybe"},
            "speculative_config['verification'] is 'maybe'",
        ),
        (
            {"tree_by_batch_size": [[1, 2, "chain:3"], [3, None, [0, 0]]], "verification": "chain"},
            "speculative_config['verification']: tree is binary:1, but rule 'chain' takes",
        ),
        ({"tree": "auto:99"}, "speculative_config['tree']: 'auto:99': NODES and DEPTH must be in"),
        ({"verification": "maybe"}, "speculative_config['verification'] is 'maybe', allowed: trav"),
        (
            {"sharpening": 0},
            "speculative_config['sharpening'] is 0, allowed: a finite number",
        ),
        ({"sharpening": "2"}, "speculative_config['sharpening'] is '2', allowed: a finite number"),
        ({"sharpening": float("nan")}, "speculative_config['sharpening'] is nan, allowed: a fini"),
        (
            {"sharpening": 2, "verification": "rrsw"},
            "speculative_config['verification']: sharpening must be 1 with rule 'rrsw', allo",
        ),
        (
            {"verification": "chain"},
            "speculative_config['verification']: tree is binary:3, but rule 'chain' takes",
        ),
        ({"proposer": "oracle"}, "speculative_config['proposer'] is 'oracle', allowed: draft_mo"),
        (
            {"use_heterogeneous_vocab": True},
            "'spechub': draft and target must share one vocabulary. Allow",
        ),
        ({"num_speculative_tokens": 3}, "speculative_config['num_speculative_tokens'] is not an"),
        ({"branching": 3}, "speculative_config['branching'] is not an option of method 'spechub'"),
        ({"rejection_sample_method": "block"}, "Allowed: method, model, verification, tree"),
        ({1: 2}, "speculative_config['1'] is not an option"),
        # no option is read before it is checked
        ({"model": 3}, "speculative_config['model'] is 3, allowed: a folder or a Hugging Face id"),
        ({"model": None, "tree_by_batch_size": "auto"}, "speculative_config['model'] is missing"),
        ({"model": 3, "tree_by_batch_size": "auto"}, "speculative_config['model'] is 3"),
        ({"tree": None}, "speculative_config['tree']: None is not a tree, allowed: binary:DEPTH"),
        (
            {"tree": {"binary": 3}},
            "speculative_config['tree']: {'binary': 3} is not a tree, allowed: binary",
        ),
        ({"verification": ["chain"]}, "speculative_config['verification'] is ['chain'], allowed:"),
        ({"proposer": {}}, "speculative_config['proposer'] is {}, allowed: draft_model"),
        ({"proposer": None}, "speculative_config['proposer'] is None, allowed: draft_model"),
        ({"sharpening": True}, "speculative_config['sharpening'] is True, allowed: a finite num"),
        ({"sharpening": None}, "speculative_config['sharpening'] is None, allowed: a finite num"),
        ({"tree_by_batch_size": 3}, "speculative_config['tree_by_batch_size']: the schedule is 3"),
        ({"revision": []}, "speculative_config['revision'] is [], allowed: a valid string"),
        ({"code_revision": 3}, "speculative_config['code_revision'] is 3, allowed: a valid strin"),
        ({"quantization": 3}, "speculative_config['quantization'] is 3, allowed: a valid string"),
        ({"quantization": "none"}, "speculative_config: Unknown quantization method: none"),
        (
            {"kv_cache_dtype": "int1"},
            "speculative_config['kv_cache_dtype'] is 'int1', allowed: '",
        ),
        (
            {"draft_tensor_parallel_size": "1"},
            "speculative_config['draft_tensor_parallel_size'] is '1', allowed: a whole number from",
        ),
        ({"draft_tensor_parallel_size": 0}, "is 0, allowed: a whole number from 1"),
        ({"draft_load_config": 3}, "speculative_config['draft_load_config'] is 3, allowed: a dict"),
        (
            {"draft_load_config": {"format": "auto"}},
            "speculative_config['draft_load_config']['format'] is not an option",
        ),
    ],
)
def test_refused_options_take_one_line(spec, message):
    with pytest.raises(ValueError) as caught:
        configured(spec)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "pipeline_parallel"),
        ({"worker_cls": "my.Worker"}, "worker_cls"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds"),
        ({"enable_return_routed_experts": True}, "enable_return_routed_experts"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "kv_transfer_config",
        ),
    ],
)
def test_unsupported_engines_are_refused(options, message):
    with pytest.raises(Unsupported, match=message) as caught:
        configured(**options)
    assert len(str(caught.value).splitlines()) == 1


def test_min_p_and_logit_bias_are_for_spechub_only():
    """Plain vLLM's own speculation goes on refusing them."""
    chain = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    other = EngineArgs(model=TARGET, speculative_config=chain).create_engine_config()
    ours = configured()
    for params in (SamplingParams(min_p=0.1), SamplingParams(logit_bias={40: 5.0})):
        with pytest.raises(VLLMValidationError, match="not yet supported with speculative"):
            params.verify(other.model_config, other.speculative_config, None, None)
        params.verify(ours.model_config, ours.speculative_config, None, None)


@pytest.mark.parametrize("asked", [None, True, False])
def test_asynchronous_scheduling_is_as_asked(asked):
    """On by default with trees, on the CPU too, where plain vLLM turns it off."""
    options = {} if asked is None else {"async_scheduling": asked}
    scheduler = configured(**options).scheduler_config
    assert scheduler.async_scheduling is (asked is not False)
    assert ("Async" in scheduler.get_scheduler_cls().__name__) is scheduler.async_scheduling
    plain = EngineArgs(model=TARGET, **options).create_engine_config()
    on_for_plain = asked is not False and not current_platform.is_cpu()
    assert plain.scheduler_config.async_scheduling is on_for_plain


def test_the_v1_runner_cannot_be_forced(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(Unsupported, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        configured()


def edited_draft(folder: Path, **changes) -> str:
    shutil.copytree(DRAFT, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_draft_with_another_vocabulary_size(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size=1024.*vocab_size=2048.*up to 2047") as caught:
        configured({"model": edited_draft(tmp_path / "draft", vocab_size=1024)})
    assert len(str(caught.value).splitlines()) == 1
    configured({"model": edited_draft(tmp_path / "padded", vocab_size=2112)})


def test_a_draft_that_reads_less_than_the_target(tmp_path):
    draft = edited_draft(tmp_path / "draft", max_position_embeddings=128)
    with pytest.raises(ValueError, match=r"reads 128 positions.*max_model_len"):
        configured({"model": draft})
    configured({"model": draft}, max_model_len=128)


def test_a_draft_whose_positions_are_scaled(tmp_path):
    """The lengths that vLLM takes for the same draft: LongRoPE counts with its scaling."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 16,
        "long_factor": [4.0] * 16,
        "original_max_position_embeddings": 64,
    }
    draft = edited_draft(
        tmp_path / "long", rope_parameters=rope, original_max_position_embeddings=64
    )
    config = configured({"model": draft})  # vLLM itself would serve it with 64 unless asked
    draft_config = config.speculative_config.draft_model_config
    assert config.model_config.max_model_len == draft_config.max_model_len == 1024
    draft = edited_draft(
        tmp_path / "short",
        rope_parameters=rope,
        original_max_position_embeddings=64,
        max_position_embeddings=200,
    )
    with pytest.raises(ValueError, match=r"the draft reads 200 positions, the target 1024; set m"):
        configured({"model": draft})
    configured({"model": draft}, max_model_len=200)
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    draft = edited_draft(tmp_path / "linear", rope_parameters=linear, max_position_embeddings=512)
    configured({"model": draft})


def test_a_target_that_is_lengthened(tmp_path, monkeypatch):
    """Overrides that are a dictionary are the target's alone; a function lengthens both."""
    longer = {"max_position_embeddings": 2048}

    def lengthen(config):
        config.max_position_embeddings = 2048
        return config

    with pytest.raises(ValueError, match=r"reads 1024 positions, the target 2048; .*as a function"):
        configured({"model": DRAFT}, max_model_len=2048, hf_overrides=longer)
    configured({"model": DRAFT}, max_model_len=1024, hf_overrides=longer)
    configured({"model": DRAFT}, max_model_len=2048, hf_overrides=lengthen)
    # the user takes the risk
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    configured({"model": DRAFT}, max_model_len=2048, hf_overrides=longer)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="speculative_config: ") as caught:
        configured({"model": str(tmp_path)})
    assert len(str(caught.value).splitlines()) == 1


def test_a_value_that_is_not_json(capsys):
    with pytest.raises(SystemExit):
        from_command_line("--speculative-config", "spechubb")
    assert "'spechubb' is neither JSON nor the word spechub" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["[1]", "3", '"ngram"'])
def test_a_value_that_is_no_object(value):
    with pytest.raises(ValueError, match="allowed: 'spechub' or an object of options"):
        from_command_line("--speculative-config", value, "--spec-method", "spechub")


def test_flags_that_contradict_the_json():
    with pytest.raises(ValueError, match="--spec-method ngram and speculative_config"):
        from_command_line("--speculative-config", JSON, "--spec-method", "ngram")
    with pytest.raises(ValueError, match="--spec-tokens"):
        from_command_line("--speculative-config", JSON, "--spec-tokens", "3")


THEIRS = '''
from vllm_spechub.proposers.base import TreeProposer
from vllm_spechub.rules.base import VerificationRule
from vllm_spechub.targets.base import Number, TargetDistribution

class Target(TargetDistribution):
    share: float = Number("a number from 0", ge=0)

    def combine(self, p, others, **parameters):
        return others[0]

class Rule(VerificationRule):
    """It knows nothing of sharpening."""

    sample_children = verify = None

class Repeats(TreeProposer):
    """Drafts without a model."""

    read = None
    vllm_method = "ngram"
    needs_model = False
    options = frozenset({"longest", "shortest"})

    @classmethod
    def check_options(cls, options, target_model_config):
        if options.get("longest", 1) < 1:
            raise ValueError("speculative_config['longest'] is below 1")

    @classmethod
    def check_config(cls, config):
        assert config.proposer_options.keys() <= cls.options
'''
RULE_GROUP, PROPOSER_GROUP = "vllm_spechub.rules", "vllm_spechub.proposers"
TARGET_GROUP = "vllm_spechub.targets"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts another package on the path, with entry points: {group: {name: "module:Class"}}."""

    def install(**groups: dict[str, str]) -> None:
        info = tmp_path / "theirs-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
        lines = [
            line
            for group, names in groups.items()
            for line in (f"[{group}]", *(f"{name} = {path}" for name, path in names.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        (tmp_path / "theirs.py").write_text(THEIRS)
        monkeypatch.syspath_prepend(tmp_path)

    def forget() -> None:
        sys.modules.pop("theirs", None)
        for registry in (RULES, PROPOSERS, TARGETS):
            vars(registry).pop("_entries", None)

    forget()
    yield install
    forget()


def test_another_package_adds_rules_and_proposers(install):
    install(
        **{
            RULE_GROUP: {"mine": "theirs:Rule"},
            PROPOSER_GROUP: {"mine": "vllm_spechub.proposers.draft_model:DraftModelProposer"},
        }
    )
    spec = configured({"verification": "mine", "proposer": "mine"}).speculative_config
    assert (spec.verification, spec.proposer) == ("mine", "mine")
    with pytest.raises(ValueError, match=r"is 'yours', allowed: traversal, .*, match, mine$"):
        configured({"verification": "yours"})


def test_another_package_adds_target_distributions(install):
    install(**{TARGET_GROUP: {"theirs": "theirs:Target"}})
    options = {"target_distribution": {"type": "theirs", "share": 2}}
    target = configured(options).speculative_config.target_distribution
    assert target.of_request({"target_share": 3}).parameters == {"share": 3}
    with pytest.raises(ValueError, match=r"share is -1, allowed: a number from 0$"):
        configured({"target_distribution": {"type": "theirs", "share": -1}})
    with pytest.raises(ValueError, match=r"needs a draft model .* but proposer 'ngram' has no dis"):
        configured(options | {"proposer": "ngram", "model": None})


def combined(spec=None, model=EXIT_TARGET, **target):
    """A configuration whose target distribution has a member."""
    members = [{"model": model, "weight": 0.5}]
    target = {"type": "logits", "members": members} | target
    return configured({"target_distribution": target} | (spec or {})).speculative_config


def test_members():
    """They are read as drafts are, and the draft may then be anything."""
    spec = combined({"proposer": "ngram", "model": None})
    assert not spec.reads_draft
    (member,) = spec.members
    assert member.draft_model_config.model == EXIT_TARGET
    assert combined(weight=-0.5).reads_draft


def test_members_that_are_refused(tmp_path):
    short = models.edited(tmp_path / "eagle-short", DRAFT, max_position_embeddings=200)
    where = r"^speculative_config\['target_distribution'\]\['members'\]\[0\]: "
    for model, message in (
        ("./none", "there is no folder './none'$"),
        (EAGLE3, r".* drafts from the target's hidden states \(.*\), but a member must be a model"),
        # in a folder whose name lets vLLM take it for a head
        (short, "the member reads 200 positions, the target 1024; set max_model_len to at most"),
    ):
        with pytest.raises(ValueError, match=where + message):
            combined(model=model)
    for option, value, instead in (
        ("tree_by_batch_size", "auto", "the ranges"),
        ("draft_layers", "auto", "a whole number"),
    ):
        message = rf"\['{option}'\] is 'auto', but `vllm-spechub tune` measures without .*{instead}"
        with pytest.raises(ValueError, match=message):
            combined({option: value})
    with pytest.raises(ValueError, match=r"'early_exit' has .* or name 'members' in the dr"):
        combined({"proposer": "early_exit", "exit_layer": 1, "model": None}, weight=0.5)


def test_another_packages_rule_need_not_know_every_option(install):
    install(**{RULE_GROUP: {"theirs": "theirs:Rule"}})
    options = configured({"verification": "theirs"}).speculative_config
    assert type(build_rule(options, PORTABLE_KERNELS)).__module__ == "theirs"
    with pytest.raises(ValueError, match="sharpening must be 1 with rule 'theirs'"):
        configured({"verification": "theirs", "sharpening": 2})


def test_a_name_that_is_taken(install):
    install(**{RULE_GROUP: {"ordered": "theirs:Rule"}})
    with pytest.raises(ValueError, match=r"rule 'ordered' of theirs:Rule .* is already vllm_spech"):
        RULES.load("ordered")


def test_a_proposer_without_a_model(install, tmp_path, monkeypatch):
    """It has its own options, vLLM's method of its choice, and measured schedules."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    install(**{PROPOSER_GROUP: {"repeats": "theirs:Repeats"}})
    options = {"method": "spechub", "proposer": "repeats", "longest": 5}

    def repeats(**more):
        engine = EngineArgs(model=TARGET, dtype="float32", speculative_config=options | more)
        return engine.create_engine_config().speculative_config

    spec = repeats(tree="chain:3")
    assert (spec.method, spec.num_speculative_tokens) == ("ngram", 3)
    assert spec.proposer_options == {"longest": 5}
    with pytest.raises(ValueError, match=r"\['longest'\] is below 1"):
        repeats(longest=0)
    with pytest.raises(ValueError, match=r"\['between'\] is not an option.*, longest, shortest$"):
        repeats(between=3)
    with pytest.raises(ValueError, match=r"\['longest'\] is not an option of method 'spechub'"):
        configured({"longest": 3})
    with pytest.raises(ValueError, match=r"no schedule was measured .*; give the ranges"):
        repeats(tree_by_batch_size="auto")
    ranges = [[1, 4, "chain:2"], [5, None, None]]
    keep(TARGET, None, "repeats", "traversal", ranges, {"longest": 5})
    found = repeats(tree_by_batch_size="auto").schedule
    assert found == TreeSchedule.parse(ranges, "traversal")


@pytest.mark.parametrize(
    "spec",
    [
        {"verification": "chain", "tree": "chain:4"},
        {"verification": "traversal", "sharpening": 2},
        {"verification": "rrs", "sharpening": 1},
    ],
)
def test_rules_and_sharpening(spec):
    config = configured(spec).speculative_config
    rule = build_rule(config, PORTABLE_KERNELS)
    assert rule.name == spec["verification"]
    assert rule.sharpening == spec.get("sharpening", 1.0)


def test_registry_names_what_it_has():
    registry = Registry("rule", {"a": "json:JSONDecoder"}, "vllm_spechub.no_such_group")
    assert registry.load("a") is json.JSONDecoder
    with pytest.raises(ValueError, match="no rule 'b', allowed: a"):
        registry.load("b")


TWO_RANGES = [[1, 4, "chain:2"], [5, None, None]]


NONE = (2**31 - 1, 0)
"""How a range without an end ends, and the number of nodes of no tree."""


@pytest.mark.parametrize(
    ("spec", "ranks", "experts", "ranges"),
    [
        ({}, 1, (0, 0), [(1, 8, 14), (9, 20, 6), (21, 128, 2), (129, 2**31 - 1, 0)]),
        # for few requests a tree reads more experts than it is worth
        ({}, 1, (128, 8), [(1, 7, 0), (8, 144, 14), (145, 300, 6), (301, 1113, 2), (1114, *NONE)]),
        ({}, 2, (0, 0), None),  # vLLM does not vary the number of drafted tokens
        ({"tree": "binary:3"}, 1, (128, 8), None),
        ({"tree_by_batch_size": TWO_RANGES}, 1, (128, 8), [(1, 4, 2), (5, *NONE)]),
    ],
)
def test_the_default_on_cuda_follows_the_load(monkeypatch, spec, ranks, experts, ranges):
    """A tree that is named is drafted for every load."""
    given = Options.model_validate({"method": "spechub", "model": DRAFT} | spec)
    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    parallel = ParallelConfig(data_parallel_size=ranks)
    target = SimpleNamespace(
        model=TARGET,
        get_num_experts=lambda: experts[0],
        get_num_experts_per_tok=lambda: experts[1],
    )
    schedule = schedule_of(given, {}, target, parallel)
    assert schedule.nodes_by_batch_size() == ranges
    if ranges is None:
        assert str(schedule.trees[0]) == "binary:3"
