# SPDX-License-Identifier: Apache-2.0
"""Where and with what figures were measured."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


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


def commit() -> str:
    """The commit of this checkout, `-dirty` if anything in it is changed."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or "unknown"


def provenance() -> list[str]:
    """Command, machine, versions, commit and load, one line each."""
    return [
        shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        device_name(),
        ", ".join(f"{name} {number}" for name, number in versions().items()),
        f"commit {commit()}",
        f"load average {os.getloadavg()[0]:.1f}",
    ]
