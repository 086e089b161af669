# SPDX-License-Identifier: Apache-2.0
"""A folder with another vLLM's sources over the installed compiled parts."""

import zipfile
from importlib import metadata
from pathlib import Path

import overlay_vllm
import pytest
import vllm

INSTALLED = Path(vllm.__file__).parent
METADATA = """Name: vllm
Requires-Dist: numpy
Requires-Dist: numpy<1
Requires-Dist: no-such-package>=2
Requires-Dist: of-other-systems; sys_platform == "none"
Requires-Dist: torch==0.1
Requires-Dist: of-an-extra; extra == "audio"
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The folder, and what pip was asked for."""
    files = {
        "vllm/__init__.py": "",
        "vllm/models/new.json": "{}",
        "vllm/_C_stable_libtorch.abi3.so": "for CUDA",
        "vllm/vllm-rs": "for CUDA",
        "vllm-9.9.dist-info/METADATA": METADATA,
    }

    def download(version: str, folder: str) -> Path:
        wheel = Path(folder) / f"vllm-{version}-cp38-abi3-linux.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        return wheel

    asked = []
    monkeypatch.setattr(overlay_vllm, "download", download)
    monkeypatch.setattr(overlay_vllm, "pip", lambda *arguments: asked.append(arguments))
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "left_over.py").touch()
    overlay_vllm.main("9.9", tmp_path / "made")
    return tmp_path / "made", asked


def test_sources_lie_over_the_installed_compiled_parts(made):
    folder, _ = made
    built = {file.relative_to(INSTALLED) for file in INSTALLED.rglob("*.so")}
    assert built
    package = folder / "vllm"
    found = {file.relative_to(package) for file in package.rglob("*") if file.is_file()}
    assert found == {Path("__init__.py"), Path("models/new.json")} | built
    for name in built:
        assert (package / name).resolve() == (INSTALLED / name).resolve()
    assert not (folder / "left_over.py").exists()


def test_it_is_a_vllm_for_the_cpu(made):
    folder, _ = made
    (found,) = metadata.distributions(name="vllm", path=[str(folder)])
    assert found.version == "9.9+cpu"


def test_what_it_requires_beyond_what_is_installed_is_added(made):
    folder, asked = made
    install, *options, numpy, other = asked[0]
    assert (install, numpy, other) == ("install", "numpy<1", "no-such-package>=2")
    assert options[-2:] == ["--target", str(folder)]
    assert len(asked) == 1


def test_what_is_imported_now_is_not_replaced(monkeypatch):
    removed = []
    monkeypatch.setattr(overlay_vllm.shutil, "rmtree", lambda *given, **_: removed.append(given))
    with pytest.raises(SystemExit, match="take it off PYTHONPATH"):
        overlay_vllm.main("9.9", INSTALLED.parent)
    assert not removed
