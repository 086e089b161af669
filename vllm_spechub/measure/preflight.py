# SPDX-License-Identifier: Apache-2.0
"""Checks before a long run, so that nothing that was measured is lost to a missing file or package.

Every check raises a ValueError of one line that names the option.
"""

import inspect
import json
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
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


def check_pair(target: str, option: str, draft: str, heads: bool = False) -> None:
    """Read the configurations of a target and of its draft, and compare their vocabularies.

    Args:
        target: a folder or a Hugging Face name, as the draft.
        option: what named the draft.
        heads: whether the draft may be a head, which the target's engine will check.

    Raises:
        ValueError: neither a folder with a model nor a Hugging Face name, another vocabulary, or a
            head.
    """
    from vllm_spechub.drafts.kinds import read_head
    from vllm_spechub.offline.simulation.texts import PairDescription

    _check_name(option, draft)
    check_models({"TARGET": target})
    head = read_head(draft)
    if head is None:
        check_models({option: draft})
        PairDescription.read(target, draft, option)
    elif not heads:
        raise ValueError(
            f"{option} {draft!r} is a head ({head.sign}), which runs only in an engine with its "
            "target: `vllm-spechub tune` measures it there"
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


def parse_layers(option: str, text: str | None, draft: str, is_head: bool) -> list[int | None]:
    """Numbers of a draft's first layers, ascending; [None] for all layers, without the option.

    Raises:
        ValueError: not such numbers, or the draft is a head.
    """
    if text is None:
        return [None]
    if is_head:
        raise ValueError(f"{option}: {draft!r} is a head, which is not cut; leave it out")
    from transformers import AutoConfig

    most = AutoConfig.from_pretrained(draft).get_text_config().num_hidden_layers
    parts, layers = text.split(","), list[int | None]()
    if not all(part.strip().isdecimal() and 1 <= int(part) <= most for part in parts):
        raise ValueError(
            f"{option} is {text!r}, allowed: numbers from 1 to {most}, such as 1,{most}"
        )
    layers += sorted({int(part) for part in parts})
    return layers
