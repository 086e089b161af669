# SPDX-License-Identifier: Apache-2.0
"""Checks before a long run, so that nothing that was measured is lost to a missing file or package.

Every check raises a ValueError of one line that names the option.
"""

import inspect
import json
import multiprocessing
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from importlib import import_module
from os import W_OK, access
from pathlib import Path
from textwrap import shorten
from typing import Any

from pydantic import ValidationError

from vllm_spechub.drafts.sources import OPTIONS, Sources
from vllm_spechub.drafts.vocabulary import first_line
from vllm_spechub.registry import PROPOSERS

GIVEN_BY_COMMANDS = {"model", "speculative_config"}
"""Arguments of `vllm.LLM` that commands give themselves."""
GUESSED_BY = ("eagle-", "eagle3", "dflash", "dspark")
"""Parts of a draft's path by which vLLM's own methods guess what it is, whatever they are told."""
OTHER_TYPES = {
    "trust_remote_code": (bool, "true or false"),
    "hf_overrides": (dict, "an object"),
}
"""Of those options that say where models come from; the others are strings."""
LONGEST_MESSAGE = 400
"""vLLM's messages may list all models that it knows."""


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


def _check_model(option: str, model: str, options: Mapping[str, Any]) -> None:
    from transformers import AutoConfig

    _check_name(option, model)
    try:
        AutoConfig.from_pretrained(model, **options)
    except Exception as error:  # each configuration has its own
        raise ValueError(f"{option} {model!r} has no model: {first_line(error)}") from error


def _check_name(option: str, model: str) -> None:
    """Check what needs no hub, which is asked several times if it does not answer."""
    if model in PROPOSERS:
        raise ValueError(f"{option} is {model!r}, a proposer, but must name a draft model")
    if model.startswith(("/", ".", "~")) and not Path(model).is_dir():
        raise ValueError(f"{option} {model!r} has no model: there is no such folder")


def check_pair(sources: Sources, option: str, in_engines: bool = False) -> None:
    """Read the configurations of a target and of its draft, and compare their vocabularies.

    Args:
        sources: folders or Hugging Face names.
        option: what named the draft.
        in_engines: whether a head may be one that runs in engines only, which check that it fits.

    Raises:
        ValueError: neither a folder with a model nor a Hugging Face name, another vocabulary, or a
            head that does not fit or cannot be used.
    """
    from vllm_spechub.offline.simulation.texts import PairDescription, read_head

    draft = sources.draft
    _check_name(option, draft)
    _check_model("TARGET", sources.target, sources.target_options)
    head = read_head(draft, **sources.draft_options)
    if head is None:
        _check_model(option, draft, sources.draft_options)
    elif in_engines:
        from vllm_spechub.drafts.kinds import check_kind
        from vllm_spechub.offline.heads import needs_engine

        check_kind(option, draft, head)
        if needs_engine(sources):
            return
    PairDescription.read(sources, option)


def engine_refusals(
    engine: Mapping[str, Any], speculative: Mapping[str, dict[str, Any] | None]
) -> dict[str, str]:
    """Which of several engines vLLM or this plugin would refuse before it loads weights, and why.

    The configurations are made in a process of their own: it may touch the GPU, and engines are
    forked from this one.

    Args:
        engine: arguments of `vllm.LLM` that all have in common.
        speculative: the `speculative_config` of each engine, by its name.
    """
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, fork) as pool:
        return pool.submit(_refused, dict(engine), dict(speculative)).result()


def _refused(
    engine: dict[str, Any], speculative: dict[str, dict[str, Any] | None]
) -> dict[str, str]:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    from vllm_spechub.drafts.kinds import MODEL, MTP

    load_general_plugins()
    known = {field.name for field in fields(EngineArgs)}
    options = {key: value for key, value in engine.items() if key in known}
    refused = {}
    for name, wanted in speculative.items():
        try:
            if wanted is not None and wanted.get("method") in (MODEL, MTP):
                _check_path(str(wanted.get("model")))
            EngineArgs(**options, speculative_config=wanted).create_engine_config()
        except ValidationError as error:
            first = error.errors()[0]
            message = first["msg"].removeprefix("Value error, ")
            message = ": ".join([*map(str, first["loc"]), message])
            refused[name] = shorten(message, LONGEST_MESSAGE)
        except Exception as error:  # vLLM raises any kind
            refused[name] = shorten(str(error), LONGEST_MESSAGE) or repr(error)
    return refused


def _check_path(draft: str) -> None:
    for word in GUESSED_BY:
        if word in draft.lower():
            raise ValueError(
                f"vLLM takes the draft {draft!r} for a head, because {word!r} is in its path; give "
                "it another path, for example by a symbolic link to its folder"
            )


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


def check_text(option: str, text: str) -> None:
    """Check that tokenizers can read a text. Python hands other bytes of a command line on.

    Raises:
        ValueError: the text is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{option} must be text in UTF-8 ({error.reason})") from error


def parse_object(option: str, text: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the text is not one.
    """
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{option} must be a JSON object, got {text!r}: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{option} must be a JSON object, got {text!r}")
    return options


def _check_types(option: str, options: Mapping[str, Any]) -> None:
    """Check the types of what is read before vLLM checks it."""
    for key in options.keys() & set(OPTIONS):
        kind, words = OTHER_TYPES.get(key, (str, "a string"))
        if not isinstance(options[key], kind | None):
            raise ValueError(f"{option} has {key!r}: {options[key]!r}, allowed: {words}")


def parse_engine_options(option: str, text: str) -> dict[str, Any]:
    """Further arguments of `vllm.LLM`, given as a JSON object.

    Raises:
        ValueError: the text is not a JSON object, vLLM does not know an argument, or the command
            gives the argument itself.
    """
    options = parse_object(option, text)
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    known = {*inspect.signature(LLM).parameters, *(field.name for field in fields(EngineArgs))}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"{option} has {', '.join(map(repr, unknown))}, which vLLM does not know")
    for key in GIVEN_BY_COMMANDS & options.keys():
        raise ValueError(f"{option} has {key!r}, which the command gives itself; leave it out")
    _check_types(option, options)
    return options


def parse_source_options(option: str, text: str) -> dict[str, Any]:
    """Those arguments of `vllm.LLM` that say where models come from, given as a JSON object.

    Raises:
        ValueError: the text is not a JSON object, or has something else in it.
    """
    options = parse_object(option, text)
    for key in options.keys() - set(OPTIONS):
        raise ValueError(
            f"{option} has {key!r}, allowed here, where no engine runs: {', '.join(OPTIONS)}"
        )
    _check_types(option, options)
    return options


def parse_costs(option: str, texts: Sequence[str]) -> Callable[[int], float]:
    """The duration of a step by its number of rows, from `ROWS=COST` each: linear in between, and
    constant outside.

    Raises:
        ValueError: not such a pair, or two for the same number of rows.
    """
    costs: dict[int, float] = {}
    for text in texts:
        rows, _, duration = text.partition("=")
        try:
            number, value = int(rows), float(duration)
        except ValueError:
            number = value = 0
        if number < 1 or not 0 < value < float("inf") or number in costs:
            raise ValueError(
                f"{option} is {text!r}, allowed: ROWS=COST with different whole numbers from 1 and "
                "costs above 0, such as 1=1 and 15=2.4"
            )
        costs[number] = value
    known = sorted(costs)

    def cost(rows: int) -> float:
        place = bisect_left(known, rows)
        if place in (0, len(known)):
            return costs[known[min(place, len(known) - 1)]]
        low, high = known[place - 1 : place + 1]
        share = (rows - low) / (high - low)
        return (1 - share) * costs[low] + share * costs[high]

    return cost


def parse_layers(
    option: str, text: str | None, sources: Sources, is_head: bool
) -> list[int | None]:
    """Numbers of a draft's first layers, ascending; [None] for all layers, without the option.

    Raises:
        ValueError: not such numbers, or the draft is a head.
    """
    if text is None:
        return [None]
    if is_head:
        raise ValueError(f"{option}: {sources.draft!r} is a head, which is not cut; leave it out")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(sources.draft, **sources.draft_options)
    most = config.get_text_config().num_hidden_layers
    parts, layers = text.split(","), list[int | None]()
    if not all(part.strip().isdecimal() and 1 <= int(part) <= most for part in parts):
        raise ValueError(
            f"{option} is {text!r}, allowed: numbers from 1 to {most}, such as 1,{most}"
        )
    layers += sorted({int(part) for part in parts})
    return layers
