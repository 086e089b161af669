# SPDX-License-Identifier: Apache-2.0
"""Which drafts the proposer takes, by their configuration and tokenizer; no weights are loaded."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from helpers import vocabularies
from helpers.models import edited
from helpers.pair import DRAFT, TARGET
from helpers.vocabularies import add, as_slow_files, beside_mistrals, drop, exchange, pad
from vllm_spechub.drafts import alone

DIFFERS = (
    r"^speculative_config\['model'\]: the draft's tokenizer differs from the target's \(first in "
)
UNKNOWN = (
    r"^speculative_config\['model'\]: the draft has vocab_size=2112 and the target 2048, which may "
    r"differ by padding only, but the {}"
)


@pytest.fixture(autouse=True, scope="module")
def _plugin():
    load_general_plugins()


def configured(draft, model=TARGET, more=None, **options):
    spec = {"method": "spechub", "model": str(draft)} | (more or {})
    options = {"model": str(model), "dtype": "float32"} | options
    config = EngineArgs(**options, speculative_config=spec).create_engine_config()
    return config.speculative_config


def assert_refused(message, *args, **kwargs):
    with pytest.raises(ValueError, match=message) as refused:
        configured(*args, **kwargs)
    assert len(str(refused.value).splitlines()) == 1


def folder_with(folder, *edits, source=DRAFT, **changes):
    edited(folder, source, **changes)
    for edit in edits:
        edit(folder)
    return folder


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ((), None),
        ((exchange,), DIFFERS + "'a'"),
        ((add,), DIFFERS + "'<more>'"),
        ((as_slow_files,), None),
        ((exchange, as_slow_files), DIFFERS + "'a'"),
        ((beside_mistrals,), None),
        ((beside_mistrals, exchange), DIFFERS + "'a'"),
        ((pad,), None),
        ((pad, exchange), DIFFERS + "'a'"),
        # nothing to compare but the sizes
        ((drop,), None),
        ((drop, pad), UNKNOWN.format("draft's tokenizer cannot be loaded")),
    ],
    ids=lambda value: "-".join(edit.__name__ for edit in value) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("named", ["folder", "hub"])
def test_tokenizers_are_compared_however_they_are_named_and_kept(
    hub, tmp_path, named, edits, message
):
    if named == "folder":
        draft = folder_with(tmp_path / "draft", *edits)
    else:
        draft = vocabularies.in_cache(hub, f"made/{tmp_path.name}", main=edits)
    if message is None:
        configured(draft)
    else:
        assert_refused(message, draft)


def test_a_target_may_have_added_tokens_that_the_draft_lacks(tmp_path):
    target = folder_with(tmp_path / "target", add, pad, source=TARGET)
    configured(DRAFT, model=target)
    configured(folder_with(tmp_path / "same", add, pad), model=target)
    draft = folder_with(tmp_path / "other", lambda folder: add(folder, "<other>"), pad)
    assert_refused(DIFFERS + "'<other>'", draft, model=target)
    draft = folder_with(tmp_path / "exchanged", exchange)
    assert_refused(DIFFERS + "'a'", draft, model=target)


@pytest.mark.parametrize(
    ("revisions", "asked", "accepted"),
    [
        ({"main": [exchange], "good": []}, "good", True),
        ({"main": [], "bad": [exchange]}, "bad", False),
        ({"v2": []}, "v2", True),
        ({"v2": [exchange]}, "v2", False),
    ],
)
def test_the_tokenizer_is_of_the_revision_that_is_loaded(hub, tmp_path, revisions, asked, accepted):
    draft = vocabularies.in_cache(hub, f"made/{tmp_path.name}", **revisions)
    if accepted:
        configured(draft, more={"revision": asked})
    else:
        assert_refused(DIFFERS, draft, more={"revision": asked})


def test_the_tokenizer_is_loaded_as_the_draft_is(monkeypatch):
    """Its code's revision and whether it is trusted."""
    asked = []
    load = alone.get_tokenizer

    def get_tokenizer(name, **options):
        asked.append(options)
        return load(name)

    monkeypatch.setattr(alone, "get_tokenizer", get_tokenizer)
    configured(DRAFT)
    configured(DRAFT, trust_remote_code=True, more={"code_revision": "abc"})
    assert "code_revision" not in asked[0]
    assert asked[0]["trust_remote_code"] is False
    assert asked[1]["code_revision"] == "abc"
    assert asked[1]["trust_remote_code"] is True


def test_a_tokenizer_that_transformers_makes_up_is_none(tmp_path):
    """For some families it gives special tokens only, where there is no file."""
    family = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    configured(folder_with(tmp_path / "same", drop, **family))
    padded = folder_with(tmp_path / "padded", drop, pad, **family)
    assert_refused(UNKNOWN.format("draft has no tokenizer"), padded)
    target = folder_with(tmp_path / "target", drop, source=TARGET, **family)
    configured(DRAFT, target)
    assert_refused(
        UNKNOWN.format("target has no tokenizer"), folder_with(tmp_path / "draft", pad), target
    )


def test_no_tokenizer_is_compared_where_there_is_none(tmp_path):
    """The user says so, and the draft's is nobody's business."""
    bare = folder_with(tmp_path / "target", drop, source=TARGET)
    foreign = folder_with(tmp_path / "foreign", exchange)
    for draft in (DRAFT, foreign, folder_with(tmp_path / "padded", drop, pad)):
        configured(draft, bare, skip_tokenizer_init=True)
    configured(foreign, skip_tokenizer_init=True)
    # and it is said who has none
    assert_refused(r"^tokenizer: '.*target' has none that can be loaded \(Couldn't", DRAFT, bare)


def test_another_tokenizer_of_the_targets(tmp_path):
    """What requests are read with counts, not what lies beside the target's weights."""
    bare = folder_with(tmp_path / "target", drop, source=TARGET)
    configured(DRAFT, bare, tokenizer=TARGET)
    foreign = folder_with(tmp_path / "foreign", exchange)
    assert_refused(DIFFERS, foreign, bare, tokenizer=TARGET)
    configured(foreign, bare, tokenizer=str(foreign))


@pytest.mark.parametrize(
    "folder",
    ["eagle-draft", "Qwen_eagle3/draft", "dflash", "dspark_7b", "EAGLE-1B", "medusa", "mtp"],
)
def test_a_path_decides_nothing(tmp_path, folder):
    """vLLM takes a draft for EAGLE's and others by a word in its path."""
    draft = folder_with(tmp_path / folder)
    ours, plain = configured(draft), configured(DRAFT)
    assert ours.method == plain.method == "draft_model"
    for one, other in ((ours, plain), (ours.draft_model_config, plain.draft_model_config)):
        same = {"model", "served_model_name", "draft_model_config", "target_model_config"}
        same |= {"hf_config", "hf_text_config", "model_weights"}
        same |= {"hf_overrides"}  # from vLLM 0.33 on, each has an object of its own
        named = vars(one).keys() - same
        assert {key: vars(one)[key] for key in named if vars(one)[key] != vars(other)[key]} == {}
    for config in (ours, plain):
        assert config.draft_model_config.hf_config.architectures == ["LlamaForCausalLM"]


def test_a_hub_name_decides_nothing(hub, tmp_path):
    draft = vocabularies.in_cache(hub, f"eagle-lab/dflash-{tmp_path.name}", main=[])
    assert configured(draft).draft_model_config.architectures == ["LlamaForCausalLM"]


def rename_weights(folder, name, form):
    """Keep one tensor, under another name, in one of two kinds of file."""
    file = folder / "model.safetensors"
    weights = {name: next(iter(load_file(file).values()))}
    file.unlink()
    if form == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, file, {"format": "pt"})


HEAD = (
    r"drafts from the target's hidden states \({}.*\), but proposer 'draft_model' needs a model th"
)
READS = "vLLM reads its configuration as "
SPECULATORS = {
    "architectures": ["Eagle3Speculator"],
    "model_type": "speculators",
    "speculators_model_type": "eagle3",
    "draft_vocab_size": 2048,
    "transformer_layer_config": json.loads((Path(DRAFT) / "config.json").read_text()),
}


@pytest.mark.parametrize(
    ("changes", "sign"),
    [
        ({"architectures": ["LlamaForCausalLMEagle3"]}, READS + "LlamaForCausalLMEagle3"),
        ({"architectures": ["EagleLlamaForCausalLM"]}, READS + "EagleLlamaForCausalLM"),
        ({"architectures": ["DFlashDraftModel"]}, READS + "DFlashDraftModel"),
        ({"architectures": ["Qwen3DSparkModel"]}, READS + "Qwen3DSparkModel"),
        (SPECULATORS, READS + "Eagle3LlamaForCausalLM"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("folder", ["draft", "eagle3"])
def test_a_head_is_refused_by_its_configuration(tmp_path, folder, changes, sign):
    """Before the target is loaded, whatever its folder is called."""
    head = folder_with(tmp_path / folder, drop, **changes)
    assert_refused(HEAD.format(sign), head, more={"proposer": "draft_model"})


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("named", ["folder", "hub"])
def test_a_head_that_calls_itself_a_model_is_refused(hub, tmp_path, named, form):
    """As the first EAGLE heads do. Its weights tell."""

    def fuse(folder):
        rename_weights(folder, "fc.weight", form)

    if named == "folder":
        head = folder_with(tmp_path / "eagle", fuse)
    else:
        head = vocabularies.in_cache(hub, f"made/{tmp_path.name}", v2=[fuse])
    more = {"proposer": "draft_model"} | ({"revision": "v2"} if named == "hub" else {})
    assert_refused(HEAD.format("its weights have the layer 'fc.weight'"), head, more=more)


def test_weights_that_cannot_be_read_decide_nothing(tmp_path):
    draft = folder_with(tmp_path / "draft")
    (draft / "model.safetensors").write_bytes(b"")
    (draft / "pytorch_model.bin").write_bytes(b"x")
    configured(draft)
