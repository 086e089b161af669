# SPDX-License-Identifier: Apache-2.0
"""The machine, the versions and the command that figures were measured with."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from vllm_spechub.trees.measured_schedule import device_name, versions


def commit() -> str:
    """The commit of this checkout, with `-dirty` if it has uncommitted changes."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or "unknown"


def provenance() -> list[str]:
    """The command, machine, versions, commit and load average, one line each."""
    return [
        shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        device_name(),
        ", ".join(f"{name} {number}" for name, number in versions().items()),
        f"commit {commit()}",
        f"load average {os.getloadavg()[0]:.1f}",
    ]
