# SPDX-License-Identifier: Apache-2.0
"""What heads draft: every row against plain PyTorch, and which heads are taken and refused."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import OPTConfig
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from helpers import heads, models, vocabularies
from helpers.engines import engine, greedy_params, model_runner, plain_greedy, token_ids
from helpers.heads import Oracle, recorded_rows
from helpers.metrics import spec_metrics
from helpers.pair import DRAFT, PROMPTS, TARGET
from vllm_spechub.drafts.fit import check_tokens
from vllm_spechub.integration.refusals import Unsupported
from vllm_spechub.offline.simulation.rows import draft_logits
from vllm_spechub.offline.simulation.texts import ModelPair
from vllm_spechub.proposers import heads as proposer_of_heads
from vllm_spechub.proposers.heads import HeadProposer


@pytest.fixture(autouse=True, scope="module")
def _plugin():
    load_general_plugins()


SAMPLED = SamplingParams(temperature=1.0, seed=3, max_tokens=24, ignore_eos=True)
# Two prompts that are alike up to the end of a block: the block's last row of a head differs, as it
# reads the token after it.
ALIKE = [{"prompt_token_ids": [*range(100, 164), token, 3]} for token in (5, 6)]
IRREGULAR = [0, 0, 0, 1, 1, 2, 4]
SCHEDULE = [[1, 2, "binary:2"], [3, 4, "chain:2"], [5, None, None]]


CLOSE = {"atol": 2e-4, "rtol": 1e-4}


def chosen(rows, count=40):
    """Some of the rows, of several depths."""
    assert len({len(row.path) for row in rows}) > 1
    return [rows[i] for i in torch.linspace(0, len(rows) - 1, count).int()]


def assert_rows_are_the_oracles(oracle, rows):
    for row in chosen(rows):
        torch.testing.assert_close(row.logits, oracle.row(row.text, row.path), **CLOSE)


def assert_rows_are_those_without_an_engine(head, rows):
    pair = ModelPair.load(TARGET, head, "cpu", torch.float32)
    for row in chosen(rows, 15):
        found = draft_logits(pair, torch.tensor(row.text), torch.tensor(row.path).long())
        torch.testing.assert_close(found, row.logits, **CLOSE)


def engine_counters(llm):
    return {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}


@pytest.fixture
def rows_of_gpus(monkeypatch):
    """The number of rows as on a GPU, where the host does not know what was rejected."""
    original = HeadProposer._rows_to_feed

    def rows_to_feed(self, step):
        with monkeypatch.context() as patch:
            patch.setattr(self, "device", SimpleNamespace(type="cuda"))
            return original(self, step)

    monkeypatch.setattr(HeadProposer, "_rows_to_feed", rows_to_feed)


@pytest.mark.parametrize(
    ("form", "tree", "options"),
    [
        ("speculators", "binary:3", {"max_num_batched_tokens": 41}),
        ("first", IRREGULAR, {"async_scheduling": True, "kv_cache_memory_bytes": 1 << 20}),
        ("speculators", SCHEDULE, {"max_num_batched_tokens": 60}),
        (
            "first",
            "levels:3,4,3",
            {"max_num_batched_tokens": 41, "num_gpu_blocks_override": 14},
        ),
    ],
    ids=["chunks", "preemption", "schedule", "levels"],
)
def test_eagle3_rows(request, tmp_path, form, tree, options):
    """Prompts in chunks and with shared blocks, rejections, mixed batches, preemption, steps
    without a tree."""
    if form == "speculators":
        request.getfixturevalue("rows_of_gpus")
    head = heads.eagle3(tmp_path / "head", form)
    prompts = [*PROMPTS, *ALIKE]
    params = [SAMPLED.clone() for _ in prompts]
    for i, each in enumerate(params):
        each.max_tokens = 16 + 4 * i
    with recorded_rows() as rows, engine(tree, draft=head, block_size=32, **options) as llm:
        llm.generate(ALIKE[:1], SAMPLED, use_tqdm=False)
        llm.generate(prompts, params, use_tqdm=False)
        answers = token_ids(llm.generate(PROMPTS, greedy_params(), use_tqdm=False))
        metrics, counters = spec_metrics(llm), engine_counters(llm)
    assert answers == plain_greedy()
    assert metrics["num_accepted_tokens"] > 0.2 * metrics["num_drafts"]
    assert counters["vllm:prefix_cache_hits"] > 0
    if "kv_cache_memory_bytes" in options or "num_gpu_blocks_override" in options:
        assert counters["vllm:num_preemptions"] > 0
    assert_rows_are_the_oracles(Oracle("eagle3", head), rows)
    assert_rows_are_those_without_an_engine(head, rows)


def test_rows_of_what_other_eagle3_heads_have(made, tmp_path):
    """Norms of queries and keys and of what is fed, a second layer, a normed output: the engine's
    rows are the commands'."""
    layer = json.loads((Path(made["eagle3"]) / "config.json").read_text())
    layer = layer["transformer_layer_config"] | {"model_type": "qwen3", "num_hidden_layers": 2}
    size, head_dim = layer["hidden_size"], layer["head_dim"]
    torch.manual_seed(4)
    norms = {"input_norm": 3 * size, **{f"fc_norm.{i}": size for i in range(3)}}
    for i in (0, 1):
        norms |= {f"layers.{i}.self_attn.{which}_norm": head_dim for which in "qk"}
        norms |= {f"layers.{i}.{which}_layernorm": size for which in ("input", "post_attention")}
    weights = load_file(Path(made["eagle3"]) / "model.safetensors")
    weights |= heads.random_layer("layers.1.", layer, 0.3)
    weights |= {f"{name}.weight": 0.5 + torch.rand(width) for name, width in norms.items()}
    options = {"norm_before_fc": True, "fc_norm": True, "norm_output": True}
    config = json.loads((Path(made["eagle3"]) / "config.json").read_text()) | options
    config |= {"norm_before_residual": False, "transformer_layer_config": layer}
    head = heads.folder_of(tmp_path / "head", config, weights)
    with recorded_rows() as rows, engine("binary:2", draft=head) as llm:
        llm.generate(PROMPTS[2:4], greedy_params(8), use_tqdm=False)
        assert type(model_runner(llm).speculator.model).__name__ == "Eagle3Qwen3ForCausalLM"
    assert_rows_are_those_without_an_engine(head, rows)


@pytest.mark.parametrize("kind", ["eagle", "mtp"])
def test_rows_of_heads_that_read_the_last_layer(tmp_path, kind):
    """EAGLE's first heads and a target's own MTP layer."""
    made = (heads.eagle1 if kind == "eagle" else heads.mimo)(tmp_path / "made")
    models = {"draft": made}
    if kind == "mtp":  # for whose type transformers would split texts in another way
        models = {"model": made, "draft": None, "tokenizer": TARGET}
    options = {"max_num_batched_tokens": 41, "block_size": 32}
    prompts = [*ALIKE[:1], *PROMPTS]
    with recorded_rows() as rows, engine(IRREGULAR, **models, **options) as llm:
        llm.generate(prompts, SAMPLED, use_tqdm=False)
        llm.generate(ALIKE[1:], SAMPLED, use_tqdm=False)
        answers = token_ids(llm.generate(PROMPTS, greedy_params(), use_tqdm=False))
        metrics = spec_metrics(llm)
    assert answers == plain_greedy()
    assert metrics["num_accepted_tokens"] > 0.1 * metrics["num_drafts"]
    assert_rows_are_the_oracles(Oracle(kind, made), rows)
    if kind == "eagle":
        assert_rows_are_those_without_an_engine(made, rows)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A head of each kind and format by name."""
    folder = tmp_path_factory.mktemp("made")
    return {
        "eagle3": heads.eagle3(folder / "speculators"),
        "first eagle3": heads.eagle3(folder / "dflash", "first"),
        "eagle": heads.eagle1(folder / "mtp"),
        "mtp": heads.mimo(folder / "dspark"),
    }


def configured(spec, **options):
    options = {"model": TARGET, "dtype": "float32"} | options
    config = EngineArgs(**options, speculative_config={"method": "spechub"} | spec)
    return config.create_engine_config()


def assert_refused(message, spec, **options):
    with pytest.raises((ValueError, Unsupported), match=message) as refused:
        configured(spec, **options)
    assert len(str(refused.value).splitlines()) == 1


def edited_head(folder, source, drop=(), layer=None, **changes):
    """A copy of a head with another configuration, without some of its weights."""
    config = json.loads((Path(source) / "config.json").read_text()) | changes
    if layer:
        config["transformer_layer_config"] |= layer
    weights = load_file(Path(source) / "model.safetensors")
    return heads.folder_of(folder, config, {k: w for k, w in weights.items() if k not in drop})


def test_the_kind_is_told_by_the_configuration_and_weights(made):
    """Whatever the folders are called."""
    for name in ("eagle3", "first eagle3", "eagle"):
        spec = configured({"model": made[name]}).speculative_config
        assert spec.proposer == spec.method == name.split()[-1]
    for spec in ({}, {"proposer": "mtp"}, {"model": made["mtp"]}):
        config = configured(spec, model=made["mtp"], tokenizer=TARGET).speculative_config
        assert config.proposer == config.method == "mtp"
        assert config.draft_model_config.model == made["mtp"]


def test_a_head_that_is_served_by_its_own_name(hub, made, tmp_path):
    """Its configuration names the target, which from vLLM 0.33 on must be on the hub."""
    target = vocabularies.in_cache(hub, "made/target", TARGET, main=[])
    config = json.loads(Path(made["eagle3"], "config.json").read_text())["speculators_config"]
    config["verifier"]["name_or_path"] = target
    head = edited_head(tmp_path / "head", made["eagle3"], speculators_config=config)
    for options in (
        {"speculative_config": {"method": "spechub", "tree": "chain:2"}},
        {"speculative_config": {"method": "spechub", "tree": "chain:2", "model": head}},
        {"spec_method": "spechub"},
    ):
        config = EngineArgs(model=head, dtype="float32", **options).create_engine_config()
        spec = config.speculative_config
        assert (config.model_config.model, spec.model) == (target, head)
        assert (type(spec).__name__, spec.proposer) == ("SpecHubConfig", "eagle3")
        assert spec.tree.depth == (2 if "speculative_config" in options else 3)
    assert_refused("is a head itself; serve '.*target'", {"model": made["eagle"]}, model=head)
    plain = EngineArgs(model=head, dtype="float32").create_engine_config()
    assert type(plain.speculative_config).__name__ == "SpeculativeConfig"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["DFlashDraftModel"]}, "is a DFlash head .*use an EAGLE-3, EAGLE or M"),
        ({"architectures": ["Qwen3DSparkModel"]}, "is a DSpark head"),
        ({"architectures": ["PEagleDraftModel"]}, "is a P-EAGLE head"),
        ({"model_type": "medusa"}, "is a Medusa head"),
        ({"model_type": "mlp_speculator"}, "is a MLP speculator head"),
        ({"hidden_size": 96}, "a target with hidden states of size 96, but this one has 192"),
        ({"target_hidden_size": 96}, "a target with hidden states of size 96, but this one"),
        ({"vocab_size": 1024}, "a target with a vocabulary of size 1024, but this one has 2048"),
        (
            {"eagle_aux_hidden_state_layer_ids": [1, 2, 4]},
            r"reads 3 of the target's layers, \[1, 2, 4\]; allowed: 3 different ones from 0 to 3",
        ),
        ({"eagle_aux_hidden_state_layer_ids": [1, 3, 3]}, r"3 of the target's layers, \[1, 3, 3\]"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1, 2, 3]}, r"reads 3 of the target's layers, \["),
        ({"num_aux_hidden_states": 2}, r"reads 2 of the target's layers, \[1, 2, 3\]"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "has use_aux_hidden_state=false"),
    ],
)
def test_what_does_not_fit_is_refused(made, tmp_path, changes, message):
    head = edited_head(tmp_path / "head", made["first eagle3"], **changes)
    assert_refused(rf"^speculative_config\['model'\]: .*{message}", {"model": head})


def test_options_that_do_not_fit_are_refused(made, tmp_path):
    wrong = r"^speculative_config\['proposer'\] is '{}', but '.*' is {}; leave 'proposer' out$"
    for proposer, model, reason in (
        ("eagle", "eagle3", r"none \(vLLM reads its configuration as Eagle3LlamaForCausalLM\)"),
        ("eagle3", "eagle", r"none \(its weights have the layer 'fc.weight'\)"),
        ("mtp", "eagle", r"none \(its weights have the layer 'fc.weight'\)"),
    ):
        spec = {"proposer": proposer, "model": made[model]}
        assert_refused(wrong.format(proposer, reason), spec)
    for proposer in ("eagle", "eagle3", "mtp"):
        spec = {"proposer": proposer, "model": DRAFT}
        assert_refused(wrong.format(proposer, "a model that runs by itself"), spec)
    assert_refused("is 'mtp', but LlamaForCausalLM brings no MTP layer", {"proposer": "mtp"})
    assert_refused(r"\['model'\] is missing", {"proposer": "eagle3"})
    several = models.edited(tmp_path / "several", made["mtp"], num_nextn_predict_layers=3)
    assert_refused("are 3 MTP layers, each for a depth of", {}, model=several, tokenizer=TARGET)
    assert_refused(
        r"\['draft_tensor_parallel_size'\] is 1, but a head is split like its target, over 2",
        {"model": made["eagle3"], "draft_tensor_parallel_size": 1},
        tensor_parallel_size=2,
    )


def test_targets_that_do_not_fit_are_refused(made, tmp_path, monkeypatch):
    sizes = {"hidden_size": 192, "vocab_size": 2048, "num_attention_heads": 6, "ffn_dim": 96}
    opt = tmp_path / "opt"
    OPTConfig(**sizes, architectures=["OPTForCausalLM"], word_embed_proj_dim=192).save_pretrained(
        opt
    )
    for name, kind in (("eagle3", "EAGLE-3"), ("eagle", "EAGLE")):
        message = f"vLLM has no {kind} for OPTForCausalLM; use a model that runs by itself"
        assert_refused(message, {"model": made[name]}, model=str(opt), tokenizer=TARGET)
    monkeypatch.setattr(proposer_of_heads, "MTP_ARCHITECTURES", ("Glm4MoeMTPModel",))
    message = "that vLLM loads as MiMoMTPModel cannot draft trees, allowed: Glm4MoeMTPModel; name a"
    assert_refused(message, {}, model=made["mtp"], tokenizer=TARGET)


@pytest.mark.parametrize(
    ("d2t", "message"),
    [
        ([0, 0, 0], None),  # which may be written down
        ([0, 2, 2045], None),
        ([0, 2, 2046], "leaves the target's vocabulary, 0 to 2047"),
        ([-1, 0, 0], "leaves the target's vocabulary, 0 to 2047"),
        ([5, 4, 7], "names a token of the target twice"),
    ],
)
def test_the_map_to_the_targets_tokens(d2t, message):
    check = partial(check_tokens, "DRAFT", "head", torch.tensor(d2t), 2048)
    if message is None:
        check()
        return
    with pytest.raises(ValueError, match=message):
        check()


def test_a_missing_map_is_refused_when_weights_load(made, tmp_path):
    head = edited_head(tmp_path / "head", made["eagle3"], drop=("d2t",))
    with (
        pytest.raises(ValueError, match=r"d2t in the weights of '.*', which maps .* is missing"),
        engine("chain:1", draft=head),
    ):
        pass
