# SPDX-License-Identifier: Apache-2.0
"""vLLM finds the `triton_kernels` that it would find without us, also from our own folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.pair import ROOT

PACKAGE = ROOT / "vllm_spechub"
# in a process of its own, without torch
HIDE = f"""
import os
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec, spec_from_file_location
find_spec("triton_kernels")  # Python remembers who finds what in a folder
spec = spec_from_file_location("import_path", {str(PACKAGE / "integration" / "import_path.py")!r})
module = module_from_spec(spec)
spec.loader.exec_module(module)
module.leave_triton_kernels_to_others()
module.leave_triton_kernels_to_others()
os.chdir(FOLDER)
ours = PathFinder.find_spec("vllm_spechub.triton_kernels", [{str(PACKAGE)!r}])
assert os.path.realpath(ours.origin) == {str(ROOT / "triton_kernels" / "__init__.py")!r}, ours
spec = find_spec("triton_kernels")
print("found", spec and spec.origin)
"""
# as vLLM does on its way to an engine
LOOK = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.layers.fused_moe import config
from vllm.utils.import_utils import get_triton_kernels_version, has_triton_kernels
print("found", has_triton_kernels(), get_triton_kernels_version())
"""


@pytest.fixture
def openais(tmp_path) -> Path:
    """A folder with a package of that name, of a version that vLLM knows."""
    package = tmp_path / "installed" / "triton_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "matmul_ogs.py").write_text("PrecisionConfig = object")
    (package / "tensor.py").write_text("SparseMatrix = object")
    return package.parent


def run(program: str, cwd: Path, *path: Path, script: Path | None = None) -> list[str]:
    """What is printed, and what else is said of kernels."""
    start = ["-c", program]
    if script is not None:
        script.write_text(program)
        start = [str(script)]
    # the root may be there to find the package
    inherited = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    done = subprocess.run(
        [sys.executable, *start],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([*map(str, path), *inherited]),
            "VLLM_LOGGING_LEVEL": "INFO",
        },
    )
    assert done.returncode == 0, done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    return [line for line in lines if any(word in line for word in ("found", "riton_k", "riton k"))]


@pytest.mark.parametrize("cwd", [ROOT, PACKAGE, Path("/")], ids=["root", "package", "/"])
def test_our_folder_is_passed_over(cwd, openais, tmp_path):
    """Where OpenAI's package is not installed, and where it is."""
    installed = f"found {openais / 'triton_kernels' / '__init__.py'}"
    late = HIDE.replace("FOLDER", repr(str(ROOT)))
    for program in (HIDE.replace("FOLDER", repr(str(cwd))), late):
        assert run(program, cwd) == ["found None"]
        assert run(program, cwd, openais) == [installed]
    # as with `python -m pytest` and for scripts, whose folder comes first
    assert run(late, cwd, ROOT, openais, script=tmp_path / "script.py") == [installed]
    (tmp_path / "link").symlink_to(ROOT)
    assert run(late, tmp_path / "link", tmp_path / "link") == ["found None"]


def test_vllm_run_from_the_root(openais):
    """It finds what it finds elsewhere, which may be its own copy, and says nothing either."""
    elsewhere = run(LOOK, Path("/"))
    assert elsewhere in (["found False None"], ["found True 3.5.1"])
    assert run(LOOK, ROOT) == elsewhere
    with_openais = ["found True 3.6"]
    if elsewhere != ["found False None"]:  # its own copy hides it
        with_openais = run(LOOK, Path("/"), openais)
    assert run(LOOK, ROOT, openais) == with_openais
