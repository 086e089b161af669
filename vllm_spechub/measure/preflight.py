# SPDX-License-Identifier: Apache-2.0
"""Checks before a long run, so that nothing that was measured is lost to a missing file or package.

Every check raises a ValueError of one line that names the option.
"""

import inspect
import json
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from os import W_OK, access
from pathlib import Path
from typing import Any

from vllm_spechub.registry import PROPOSERS


def check_modules(*names: str) -> None:
    """Import what is needed later, for example to draw a plot at the end.

    Raises:
        ValueError: a module cannot be imported.
    """
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise ValueError(
                f"{name.partition('.')[0]} cannot be imported ({error}): "
                "pip install 'vllm-spechub[cli]'"
            ) from error


def check_models(models: Mapping[str, str]) -> None:
    """Read the configuration of each model, given by the name of its option.

    Raises:
        ValueError: neither a folder with a model nor a Hugging Face name, or a proposer's name.
    """
    from transformers import AutoConfig

    for option, model in models.items():
        _check_name(option, model)
        try:
            AutoConfig.from_pretrained(model)
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{option} {model!r} has no model: {reason}") from error


def _check_name(option: str, model: str) -> None:
    """Check what needs no hub, which is asked several times if it does not answer."""
    if model in PROPOSERS:
        raise ValueError(f"{option} is {model!r}, a proposer, but must name a draft model")
    if model.startswith(("/", ".", "~")) and not Path(model).is_dir():
        raise ValueError(f"{option} {model!r} has no model: there is no such folder")


def check_pair(target: str, option: str, draft: str, in_engines: bool = False) -> None:
    """Read the configurations of a target and of its draft, and compare their vocabularies.

    Args:
        target: a folder or a Hugging Face name, as the draft.
        option: what named the draft.
        in_engines: whether a head may be one that runs in engines only, which check that it fits.

    Raises:
        ValueError: neither a folder with a model nor a Hugging Face name, another vocabulary, or a
            head that does not fit or cannot be used.
    """
    from vllm_spechub.offline.simulation.texts import PairDescription, read_head

    _check_name(option, draft)
    check_models({"TARGET": target})
    head = read_head(draft)
    if head is None:
        check_models({option: draft})
    elif in_engines:
        from vllm_spechub.drafts.kinds import check_kind
        from vllm_spechub.offline.heads import needs_engine

        check_kind(option, draft, head)
        if needs_engine(draft):
            return
    PairDescription.read(target, draft, option)


def check_output_folder(option: str, folder: Path) -> None:
    """Make the folder unless it exists, and try to write into it.

    Raises:
        ValueError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{option} {folder} cannot be written: {error.strerror}") from error


def check_output_file(option: str, file: Path) -> None:
    """Check that a file can be written; its folder must exist.

    Raises:
        ValueError: the folder is missing, or the file cannot be written.
    """
    if not file.parent.is_dir():
        raise ValueError(f"{option} {file} cannot be written: there is no folder {file.parent}")
    if file.is_dir() or (file.exists() and not access(file, W_OK)):
        raise ValueError(f"{option} {file} cannot be written: it is a folder or read-only")
    check_output_folder(option, file.parent)


def parse_object(option: str, text: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the text is not one.
    """
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{option} must be a JSON object, got {text!r}: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{option} must be a JSON object, got {text!r}")
    return options


def parse_engine_options(option: str, text: str) -> dict[str, Any]:
    """Further arguments of `vllm.LLM`, given as a JSON object.

    Raises:
        ValueError: the text is not a JSON object, or vLLM does not know an argument.
    """
    options = parse_object(option, text)
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    known = {*inspect.signature(LLM).parameters, *(field.name for field in fields(EngineArgs))}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"{option} has {', '.join(map(repr, unknown))}, which vLLM does not know")
    return options
