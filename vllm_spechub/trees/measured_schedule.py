# SPDX-License-Identifier: Apache-2.0
"""The store of measurements: `vllm-spechub tune` writes schedules, which
`"tree_by_batch_size": "auto"` reads, and `tune --levels` and `shape --levels` write level widths,
which `"levels:auto"` reads.

Each combination of target, draft, rule, device and versions has a file below vLLM's cache root, and
of level widths each number of nodes and levels.
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllm_spechub.trees.level_tree import LevelTree
from vllm_spechub.triton_kernels.rules import DEFAULT_RULE

Schedule = list[list[Any]]
"""`[first, last, tree]` for each range of running requests, as in `tree_by_batch_size`."""


def device_name() -> str:
    """The name of the GPU, or the number of cores and the name of the processor."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return current_platform.get_device_name()
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        fields = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        name = next((text.strip() for key, _, text in fields if key.strip() == "model name"), name)
    return f"{os.cpu_count()} cores {name}"


def versions() -> dict[str, str]:
    """The installed versions of what a measurement depends on, by package."""
    import vllm

    return {
        "vllm": vllm.__version__,
        "vllm-spechub": version("vllm-spechub"),
        "torch": version("torch"),
    }


def _model(name: str) -> str:
    """The full path of a folder; any other name as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


Options = Mapping[str, Any]
"""A proposer's own options, which a schedule was measured with."""


def _identity(target: str, draft: str | None) -> dict[str, Any]:
    """What is valid for a pair here. torch's version is left out because vLLM's version fixes
    it."""
    return {
        "target": _model(target),
        "draft": _model(draft) if draft else None,
        "device": device_name(),
        "versions": {name: number for name, number in versions().items() if name != "torch"},
    }


def _of_schedule(
    target: str, draft: str | None, proposer: str, rule: str, options: Options
) -> dict[str, Any]:
    """What a schedule is valid for."""
    own = {"options": dict(options)} if options else {}
    return _identity(target, draft) | {"proposer": proposer, "rule": rule} | own


def folder() -> Path:
    """The folder of all measured schedules."""
    import vllm.envs as envs

    return Path(envs.VLLM_CACHE_ROOT) / "spechub" / "tuned"


def _file(identity: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return folder() / f"{digest[:16]}.json"


def keep(
    target: str,
    draft: str | None,
    proposer: str,
    rule: str,
    schedule: Schedule,
    options: Options = MappingProxyType({}),
) -> Path:
    """Store a schedule for `measured_schedule`, which takes the same arguments.

    Returns:
        The file that was written.
    """
    identity = _of_schedule(target, draft, proposer, rule, options)
    return _write(identity, {"tree_by_batch_size": schedule})


def keep_layers(target: str, draft: str, layers: int) -> None:
    """Store after how many layers a draft suits a target best, for `measured_layers`."""
    _write(_of_layers(target, draft), {"draft_layers": layers})


def _of_layers(target: str, draft: str) -> dict[str, Any]:
    return _identity(target, draft) | {"choice": "draft_layers"}


def _write(identity: dict[str, Any], found: dict[str, Any]) -> Path:
    file = _file(identity)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(identity | found, indent=1) + "\n", encoding="utf-8")
    return file


def measured_layers(target: str, draft: str) -> int:
    """After how many layers a draft suits a target best, as `vllm-spechub tune` has measured.

    Raises:
        ValueError: nothing was measured, and the message names the command that measures.
    """
    file = _file(_of_layers(target, draft))
    if not file.exists():
        raise ValueError(
            f"no depth of this draft was measured for this target on {device_name()}; "
            f"`vllm-spechub tune {target} --draft {draft} --draft-layers 3,6,12 --prompts FILE` "
            "measures several"
        )
    return json.loads(file.read_text(encoding="utf-8"))["draft_layers"]


def _of_widths(
    target: str, draft: str, rule: str, nodes: int, depth: int, options: Options
) -> dict[str, Any]:
    size = {"choice": "levels", "rule": rule, "nodes": nodes, "depth": depth}
    return _identity(target, draft) | size | {"options": dict(options)}


def keep_widths(
    target: str,
    draft: str,
    rule: str,
    nodes: int,
    depth: int,
    tree: LevelTree,
    options: Options = MappingProxyType({}),
) -> None:
    """Store the best widths of so many nodes and levels at most, for `measured_widths`, which takes
    the same arguments."""
    _write(_of_widths(target, draft, rule, nodes, depth, options), {"tree": str(tree)})


def measured_widths(
    target: str,
    draft: str | None,
    rule: str,
    nodes: int,
    depth: int,
    options: Options = MappingProxyType({}),
) -> LevelTree:
    """The level widths that `vllm-spechub shape --levels` or `tune --levels` has measured.

    Args:
        target, draft, rule, options: as `measured_schedule` takes them.
        nodes: the largest number of drafted nodes.
        depth: the number of levels.

    Raises:
        ValueError: nothing was measured, and the message names the command that measures.
    """
    if draft is None:  # which no command measures
        raise ValueError("level widths are measured for a draft; give levels:WIDTH,WIDTH,...")
    file = _file(_of_widths(target, draft, rule, nodes, depth, options))
    if not file.exists():
        command = f"shape {target} {draft} --levels"
        if options or draft == target:  # which `shape` does not measure
            command = f"tune {target} --draft {draft} --levels{_layers(options)}"
        raise ValueError(
            f"no widths of {nodes} nodes and {depth} levels were measured for this pair with "
            f"{rule!r} here; `vllm-spechub {command} --rule {rule} --nodes {nodes} --depth {depth} "
            "--prompts FILE` measures them, or give levels:WIDTH,WIDTH,..."
        )
    return LevelTree.parse(json.loads(file.read_text(encoding="utf-8"))["tree"])


def measured_schedule(
    target: str,
    draft: str | None,
    proposer: str,
    rule: str,
    options: Options = MappingProxyType({}),
) -> Schedule:
    """The schedule that `vllm-spechub tune` has measured on this machine.

    Args:
        target: the target model as the engine is given it, a folder or a Hugging Face id.
        draft: the draft model or head, likewise; None for a proposer that needs none.
        proposer: the proposer's name.
        rule: the verification rule.
        options: the proposer's own options.

    Raises:
        ValueError: nothing was measured, and the message names the command that measures; or no
            tree was faster than plain vLLM.
    """
    identity = _of_schedule(target, draft, proposer, rule, options)
    file = _file(identity)
    if not file.exists():
        installed = ", ".join(f"{name} {number}" for name, number in identity["versions"].items())
        raise ValueError(
            f"no schedule was measured for this pair with {rule!r} on {identity['device']} with "
            f"{installed}; {_remedy(target, draft, rule, options)}"
        )
    schedule = json.loads(file.read_text(encoding="utf-8"))["tree_by_batch_size"]
    if not any(tree for *_, tree in schedule):
        raise ValueError(
            "no tree was faster than plain vLLM when `vllm-spechub tune` measured on this machine; "
            "leave speculation off"
        )
    return schedule


def _remedy(target: str, draft: str | None, rule: str, options: Options) -> str:
    if draft is None:  # which `tune` does not measure
        return "give the ranges, [[FIRST, LAST, TREE], ...]"
    option = "" if rule == DEFAULT_RULE else f" --rule {rule}"
    option += _layers(options)
    command = f"vllm-spechub tune {target} --draft {draft}{option} --prompts FILE"
    return f"`{command}` measures one"


def _layers(options: Options) -> str:
    """The option of `tune` for how many of the draft's layers run."""
    layers = options.get("draft_layers")
    return f" --draft-layers {layers}" if layers else ""
