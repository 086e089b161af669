# SPDX-License-Identifier: Apache-2.0
"""Tokenizers that a draft may come with, made in the folder of a model."""

import json
import shutil
from pathlib import Path

from helpers.pair import DRAFT


def drop(folder: Path) -> None:
    """No tokenizer at all."""
    for file in folder.glob("tokenizer*"):
        file.unlink()


def exchange(folder: Path) -> None:
    """A foreign vocabulary of the same size: two tokens have each other's id."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(tokenizer))


def add(folder: Path, name: str = "<more>") -> None:
    """One special token more."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    special = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"].append(special | {"id": 2048, "content": name})
    file.write_text(json.dumps(tokenizer))


def as_slow_files(folder: Path) -> None:
    """The same tokenizer as `vocab.json` and `merges.txt`."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    drop(folder)
    model = tokenizer["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    names = {"tokenizer_class": "GPT2Tokenizer", "unk_token": None}
    special = tokenizer["added_tokens"][0]["content"]
    names |= {"bos_token": special, "eos_token": special}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def beside_mistrals(folder: Path) -> None:
    """Files by which a repository is known for one in Mistral's format, too."""
    (folder / "consolidated.safetensors").touch()
    (folder / "tekken.json").write_text("{}")


def pad(folder: Path) -> None:
    """A model with 64 rows more than its tokenizer has tokens."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 2112}))


def in_cache(cache: Path, name: str, source: str = DRAFT, **revisions) -> str:
    """Put copies of a model into a cache of the Hugging Face hub.

    Args:
        cache: the hub's folder, as `HF_HUB_CACHE`.
        name: "owner/model".
        source: the model's folder.
        revisions: for each, the functions of this module to call with its folder.
    """
    repository = cache / f"models--{name.replace('/', '--')}"
    for revision, edits in revisions.items():
        commit = (revision.encode().hex() * 40)[:40]
        snapshot = repository / "snapshots" / commit
        shutil.copytree(source, snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        for edit in edits:
            edit(snapshot)
    return name
