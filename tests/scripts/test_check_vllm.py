# SPDX-License-Identifier: Apache-2.0
"""The check that only reads a vLLM: agrees with what is stored of each version, and sees what
changes."""

import re
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import check_vllm
import pytest
import vllm
import vllm_touches
from vllm_decisions import DECISIONS
from vllm_source import VllmSource
from vllm_touches import (
    Sources,
    body,
    compare,
    differences,
    facts,
    look,
    stand_in_problems,
    store,
    stored,
)

from vllm_spechub.cpu.vllm_kernels import HOST_KERNELS
from vllm_spechub.integration import patches
from vllm_spechub.integration.versions import MODULES, running

BLOCK_TABLES = "vllm.v1.worker.gpu.block_table._gather_block_tables_kernel"
GUMBEL = "vllm.v1.worker.gpu.sample.gumbel"
WORKER = "vllm.v1.worker.gpu_worker.Worker.__init__"


@pytest.fixture(scope="module")
def installed():
    return VllmSource(Path(vllm.__file__).parents[1])


def wheel(tmp_path: Path, **modules: str) -> VllmSource:
    """A wheel of another vLLM, which consists of these modules."""
    path = tmp_path / "vllm-9.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {"__init__": "", **modules}.items():
            archive.writestr(f"vllm/{name.replace('.', '/')}.py", text)
    return VllmSource(path)


EXPECT = "run, for every supported version: python scripts/check_vllm.py VERSION --expect"


def test_what_is_stored_is_what_the_sources_rely_on(installed):
    assert installed.version == running()
    assert facts(installed, Sources(version=running())) == stored()[running()], EXPECT


def test_every_version_has_what_all_of_them_are_relied_on_for(installed):
    """What no version's own module uses, as the installed version shows it."""
    shared = facts(installed, Sources(version=None))
    assert stored().keys() == MODULES.keys()
    for version, known in stored().items():
        for kind, symbols in shared.items():
            # whether something is a function, and so has a body to compare, depends on the version
            missing = symbols.keys() - known[kind].keys() if kind != "bodies" else set()
            assert not missing, f"{version}: {missing}; {EXPECT}"


@pytest.mark.parametrize("version", MODULES)
def test_stand_ins_and_replacements_take_a_versions_arguments(version):
    known = stored()[version]
    assert not stand_in_problems(version, known["kernels"])
    for patch in patches.ALL:
        looks = known["replaced"][patch.symbol.replace(":", ".")]
        if looks not in ("attribute", "property"):
            names = re.findall(r"(\w+)(?:=\.\.)?(?: \(keyword\))?[,)]", looks.partition("(")[2])
            assert tuple(names) == patch.parameters, patch.symbol


def test_every_difference_between_versions_has_been_decided_on():
    for older, newer in pairwise(MODULES):
        found = differences(stored()[older], stored()[newer])
        symbols = {symbol for kind in found.values() for symbol in kind}
        assert symbols == DECISIONS[newer].keys()


def test_everything_replaced_and_every_stand_in_is_read():
    expected = stored()[running()]
    assert len(expected["replaced"]) == len(patches.ALL)
    assert expected["kernels"].keys() == HOST_KERNELS.keys()
    assert WORKER in expected["bodies"]
    assert "vllm.v1.worker.gpu_worker.Worker.init_device" in expected["overridden"]
    assert "vllm.lora.model_manager.LoRAModelManager._last_mapping" in expected["inherited"]
    manager = "vllm.v1.structured_output.StructuredOutputManager"
    assert f"{manager}._grammar_bitmask" in expected["inherited"]


def test_the_differences_of_0_33_are_seen():
    found = differences(stored()["0.32.0"], stored()["0.33.0"])
    assert found["kernels"][BLOCK_TABLES] == "takes 10 arguments by position, the stand-in 7"
    assert found["bodies"][WORKER].replace('"', "'") == (
        "has another body; new: raise ValueError('Model Runner V2 requires Triton.')"
    )
    # a function that the kernel calls has changed, not the kernel itself
    assert found["bodies"][f"{GUMBEL}._gumbel_sample_kernel"] == "has another body"
    assert found["names"]["vllm.envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND"].endswith("the older one")


def test_a_kernel_with_more_arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_touches, "KINDS", {"kernels": ""})
    file = Path(vllm.__file__).parent / "v1" / "worker" / "gpu" / "block_table.py"
    last = "    num_reqs,  # actual number of requests (for padding)\n"
    text = file.read_text()
    assert last in text
    edited = text.replace(last, f"{last}    one_more_ptr,\n")
    source = wheel(tmp_path, **{"v1/worker/gpu/block_table": edited})
    expected = {"kernels": {BLOCK_TABLES: stored()[running()]["kernels"][BLOCK_TABLES]}}
    problem = r"takes (8|11) arguments by position, the stand-in (7|10)"
    assert re.fullmatch(problem, compare(source, expected)["kernels"][BLOCK_TABLES])
    assert BLOCK_TABLES in stand_in_problems(running(), look(source, "kernels", [BLOCK_TABLES]))


def test_a_version_that_is_no_longer_supported_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_touches, "SIGNATURES", tmp_path / "signatures.json")
    vllm_touches.SIGNATURES.write_text('{"0.31.0": {}, "0.32.0": {}}')
    store("0.33.0", {"names": {"vllm": "module"}})
    assert stored() == {"0.32.0": {}, "0.33.0": {"names": {"vllm": "module"}}}


@pytest.mark.parametrize(
    ("edit", "kind", "expected"),
    [
        ("def f(self, a, b=1, *, c): ...", "overridden", ""),
        ("def f(self, a, c, *, b=1): ...", "overridden", "looks like (self, a, c, b=.. (keyword))"),
        ("async def f(self, a, b=1, *, c): ...", "overridden", "looks like async (self, a, b=.."),
        ("f = 1", "overridden", "looks like attribute"),
        ("def g(self): ...", "overridden", "is gone"),
        (
            "def f(self, a, b=1, *, c):\n        'Documented.'\n        1\n        ...  ",
            "bodies",
            "",
        ),
        ("def f(self, a, b=1, *, c):\n        1\n        # why\n\n        ...", "bodies", ""),
        ("def f(self, a, b=1, *, c):\n        pass", "bodies", "has another body"),
        (
            "def f(self, a, b=1, *, c):\n        raise ValueError(\n            'no'\n        )",
            "bodies",
            "has another body; new: raise ValueError( 'no' )",
        ),
    ],
)
def test_changes_of_a_method_are_seen(edit, kind, expected, tmp_path, monkeypatch):
    """Inherited from a base that another module imports under another name."""
    monkeypatch.setattr(vllm_touches, "KINDS", {kind: ""})

    def version(name: str, method: str) -> VllmSource:
        (tmp_path / name).mkdir()
        return wheel(
            tmp_path / name,
            a=f"class Base:\n    {method}\n",
            b="if True:\n    from .a import Base as B\nclass C(B):\n    x: int = 1\n",
        )

    old = version("old", "def f(self, a, b=1, *, c):\n        1\n        ...")
    symbol = "vllm.b.C.f"
    found = compare(version("new", edit), {kind: look(old, kind, [symbol])})[kind][symbol]
    assert found.startswith(expected)
    assert bool(found) == bool(expected)


def test_attributes_are_found_where_a_method_assigns_them(tmp_path):
    source = wheel(
        tmp_path,
        a="class Base:\n    def load(self): self.model = 1\n",
        b="from vllm.a import *\nimport torch\nfrom vllm import a\nclass C(a.Base): ...\n",
    )
    symbols = ["vllm.b.C.model", "vllm.b.C.other", "vllm.b.torch"]
    found = look(source, "inherited", symbols)
    assert found == dict(zip(symbols, ["attribute", "", "is torch"], strict=True))


def test_a_body_is_a_digest_and_its_errors(tmp_path):
    function = "def f(a):\n    if a:\n        raise ValueError(\n            'no'\n        )\n"
    source = wheel(tmp_path, module=function)
    digest, error = body(source, source.find("vllm.module.f")).split("; ")
    assert len(digest) == 12
    assert error == "raise ValueError( 'no' )"


def ours(tmp_path: Path, text: str) -> Sources:
    (tmp_path / "vllm_spechub").mkdir()
    (tmp_path / "vllm_spechub" / "new.py").write_text(text)
    (tmp_path / "vllm_spechub" / "v0_32.py").write_text("from vllm import no_longer_there\n")
    return Sources(tmp_path, "0.33.0")


def test_new_code_of_ours_is_followed(installed, tmp_path):
    """Names, overridden methods through a mixin, inherited attributes, calls of `super()`."""
    sources = ours(
        tmp_path,
        "import vllm.envs as envs\n"
        "from vllm.v1.worker.gpu_worker import Worker\n"
        "class Mixin:\n"
        "    def sleep(self, level=1):\n"
        "        super().sleep(level)\n"
        "        return self.model_runner, envs.VLLM_LOGGING_LEVEL\n"
        "class Mine(Mixin, Worker):\n"
        "    def ours(self): return self.sleep()\n",
    )
    base = "vllm.v1.worker.gpu_worker.Worker"
    found = facts(installed, sources)
    assert found["names"].keys() == {"vllm.envs", "vllm.envs.VLLM_LOGGING_LEVEL", base}
    assert found["overridden"].keys() == {f"{base}.sleep"}
    assert found["inherited"].keys() == {f"{base}.model_runner"}
    assert {f"{base}.sleep", f"{base}.__init__"} <= found["bodies"].keys()


def test_a_name_that_is_not_there(installed, tmp_path):
    with pytest.raises(LookupError, match=r"not in this vLLM: vllm\.envs\.NO_SUCH"):
        facts(installed, ours(tmp_path, "from vllm import envs\nprint(envs.NO_SUCH)\n"))


def test_a_private_attribute_needs_an_owner(installed, tmp_path):
    with pytest.raises(LookupError, match="name the class that has _secret"):
        facts(installed, ours(tmp_path, "def f(layer):\n    return layer._secret\n"))


def test_the_command_on_the_installed_vllm(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_vllm.py", str(Path(vllm.__file__).parents[1])])
    with pytest.raises(SystemExit) as stopped:
        check_vllm.typer.run(check_vllm.main)
    assert not stopped.value.code
    assert f"vLLM {running()}, compared with {running()}; not run" in capsys.readouterr().out
