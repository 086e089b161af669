# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the kernel tests, and which of their compilations are made.

All of them where anything that is compiled differs from what the last full run compiled
(`compiled.json`), or with `--all-targets`; else a few. A full run that passes writes the record.
"""

import json
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from helpers import quick_interpreter

    quick_interpreter.install()

import pytest

from helpers.aot_compile import RECORD, Compiler, compiled_now
from helpers.devices import DEVICE


def pytest_addoption(parser):
    parser.addoption("--all-targets", action="store_true", help="compile kernels for every target")


def pytest_configure(config):
    line = "all_targets: a compilation that is only made when what is compiled has changed"
    config.addinivalue_line("markers", line)
    config.compiled = compiled_now()
    recorded = RECORD.exists() and json.loads(RECORD.read_text()) == config.compiled
    config.every_target = config.option.all_targets or not recorded


def pytest_report_header(config):
    return f"compilations: {'all' if config.every_target else 'a few; --all-targets makes all'}"


def pytest_collection_modifyitems(config, items):
    if not config.every_target:
        left_out = [item for item in items if item.get_closest_marker("all_targets")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def pytest_sessionfinish(session, exitstatus):
    """A run of nothing less than all compilations, on a machine without a GPU, is recorded."""
    config = session.config
    option = config.option
    whole = {"tests/kernels", "tests/kernels/test_compile.py"} & set(config.args)
    everything = (
        config.every_target
        and whole
        and not (option.keyword or option.markexpr or option.collectonly)
    )
    if everything and exitstatus == 0 and not hasattr(config, "workerinput"):
        RECORD.write_text(json.dumps(config.compiled, indent=2) + "\n")


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return tensor
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype == torch.bool else 113)


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """Fill fresh memory with NaN (113 for integers), so that an element nobody wrote shows."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, f=original, **k: _poison(f(*a, **k)))


@pytest.fixture(autouse=True)
def single_thread():
    """Small tensors gain nothing from threads, and lose much when cores are shared."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def few_splits(monkeypatch):
    """Rows are split over two programs, and attention has few beyond its blocks: the interpreter
    runs one after the other."""
    from vllm_spechub.triton_kernels import lanes_device
    from vllm_spechub.triton_kernels.tree_attention import kernel

    if not torch.cuda.is_available():
        monkeypatch.setattr(lanes_device, "SPLITS", 2)
        monkeypatch.setattr(kernel, "MORE_PROGRAMS", 12)


@pytest.fixture(scope="session")
def compile_for():
    """`compile_for(kernel, signature, constexprs, capability, num_warps)`: see `Compiler`."""
    compiler = Compiler()
    yield compiler
    compiler.close()


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: on the CPU under the interpreter, else on the GPU."""
    return DEVICE
