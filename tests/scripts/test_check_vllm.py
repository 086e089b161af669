# SPDX-License-Identifier: Apache-2.0
"""The signature check that needs no installation: agrees with the installed vLLM, sees changes."""

import csv
import subprocess
import sys
import zipfile
from pathlib import Path

import support_tables as support
import vllm
from vllm_source import check_source, reader

from helpers.pair import SCRIPTS
from vllm_spechub.integration import patches as ledger
from vllm_spechub.integration.patch import SUPPORTED_VLLM, Patch

SCRIPT = SCRIPTS / "check_vllm.py"


def test_the_installed_vllm_passes():
    folder = Path(vllm.__file__).parents[1]
    done = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_recorded_check_is_of_this_ledger():
    with support.CHECKS.open(newline="") as file:
        checks = {row["vllm"]: row for row in csv.DictReader(file)}
    assert checks.keys() == support.VERSIONS.keys()
    for row in checks.values():
        assert int(row["symbols"]) == len(ledger.ALL), f"run: {row['command']}"
    assert checks[SUPPORTED_VLLM]["as_expected"] == checks[SUPPORTED_VLLM]["symbols"]


def patch(symbol, *parameters):
    return Patch(symbol, parameters, "", "", "", "", lambda original: original)


def test_changes_are_seen(tmp_path):
    """In a wheel: kept, other parameters, gone, moved behind a re-export, under a condition."""
    wheel = tmp_path / "vllm-9.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/__init__.py", "from .a import moved as here\n")
        archive.writestr("vllm/a.py", "if True:\n    def moved(x, *, y, **z): ...\n")
        archive.writestr("vllm/b.py", "class C:\n    size: int = 1\n    def f(self, new): ...\n")
    patches = [
        patch("vllm:here", "x", "y", "z"),
        patch("vllm.b:C.f", "self", "old"),
        patch("vllm.b:C.g", "self"),
        patch("vllm.b:C.size"),
        patch("vllm.gone:f"),
    ]
    assert list(check_source(patches, reader(wheel)).values()) == [
        "",
        "takes ('self', 'new'), expected ('self', 'old')",
        "is gone",
        "",
        "is gone",
    ]
