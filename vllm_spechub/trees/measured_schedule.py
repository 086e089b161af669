# SPDX-License-Identifier: Apache-2.0
"""Where measured schedules are kept for `"tree_by_batch_size": "auto"`.

One file for each target, draft, rule, device and set of versions, below vLLM's cache root.
"""

import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_spechub.triton_kernels.rules import DEFAULT_RULE

Schedule = list[list[Any]]
"""`[first, last, tree]` for each range of running requests, as `tree_by_batch_size` has it."""


def device_name() -> str:
    """The GPU's name, or the processor's with its cores."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return current_platform.get_device_name()
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        fields = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        name = next((text.strip() for key, _, text in fields if key.strip() == "model name"), name)
    return f"{os.cpu_count()} cores {name}"


def versions() -> dict[str, str]:
    import vllm

    return {
        "vllm": vllm.__version__,
        "vllm-spechub": version("vllm-spechub"),
        "torch": version("torch"),
    }


def _model(name: str) -> str:
    """A folder's full path, or a Hugging Face id."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _identity(target: str, draft: str, rule: str) -> dict[str, Any]:
    """What a schedule holds for. torch is vLLM's choice."""
    return {
        "target": _model(target),
        "draft": _model(draft),
        "rule": rule,
        "device": device_name(),
        "versions": {name: number for name, number in versions().items() if name != "torch"},
    }


def folder() -> Path:
    """The folder of all measured schedules."""
    import vllm.envs as envs

    return Path(envs.VLLM_CACHE_ROOT) / "spechub" / "tuned"


def _file(identity: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return folder() / f"{digest[:16]}.json"


def keep(target: str, draft: str, rule: str, schedule: Schedule) -> Path:
    """Write a schedule down. -> its file"""
    identity = _identity(target, draft, rule)
    file = _file(identity)
    file.parent.mkdir(parents=True, exist_ok=True)
    record = identity | {"tree_by_batch_size": schedule}
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return file


def measured_schedule(target: str, draft: str, rule: str) -> Schedule:
    """The schedule that `vllm-spechub tune` has measured on this machine.

    Args:
        target: a folder or a Hugging Face id, as the engine has it.
        draft: likewise.
        rule: the verification rule.

    Raises:
        ValueError: there is none, with the command that makes it; or no tree was worth it. One
            line.
    """
    identity = _identity(target, draft, rule)
    file = _file(identity)
    if not file.exists():
        option = "" if rule == DEFAULT_RULE else f" --rule {rule}"
        installed = ", ".join(f"{name} {number}" for name, number in identity["versions"].items())
        raise ValueError(
            f"no schedule was measured for this pair with {rule!r} on {identity['device']} with "
            f"{installed}; `vllm-spechub tune {target} --draft {draft}{option} --prompts FILE` "
            "measures one"
        )
    schedule = json.loads(file.read_text(encoding="utf-8"))["tree_by_batch_size"]
    if not any(tree for *_, tree in schedule):
        raise ValueError(
            "no tree was faster than plain vLLM here when `vllm-spechub tune` measured it; leave "
            "speculation off"
        )
    return schedule
