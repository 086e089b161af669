# SPDX-License-Identifier: Apache-2.0
"""What is settled before torch or vLLM is imported, and which tests cannot share a process."""

import os

# Engines run inside the test's process, with one OpenMP thread on any core: nearly all of an
# engine's work is one thread's, and two engines at a time would only spin for each other.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run, however slow the machine is; `--hypothesis-profile default` looks
# for others.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")

TESTS = Path(__file__).parent
APART = [TESTS / folder for folder in ("kernels", "cpu/vllm_kernels", "ray_cluster")]
"""Groups of their own: Triton's interpreter is a whole process's, and a Ray cluster is slow."""


def group_of(path: Path) -> Path:
    return next((folder for folder in APART if path.is_relative_to(folder)), TESTS)


def named_groups(config) -> set[Path]:
    paths = (config.invocation_params.dir / arg.partition("::")[0] for arg in config.args)
    return {group_of(path.resolve()) for path in paths}


@pytest.fixture
def inspected_here(monkeypatch):
    """vLLM asks a class what it supports in a process of its own, which imports everything anew."""
    monkeypatch.setattr("vllm.model_executor.models.registry._run_in_subprocess", lambda ask: ask())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of a Hugging Face cache, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def pytest_configure(config):
    groups = named_groups(config)
    if len(groups) > 1:
        names = ", ".join(sorted(str(path.relative_to(TESTS.parent)) for path in groups))
        raise pytest.UsageError(f"{names}: each needs a pytest of its own, see CONTRIBUTING.md")


def pytest_report_header(config):
    rest = sorted(str(path.relative_to(TESTS.parent)) for path in set(APART) - named_groups(config))
    return f"only if named: {', '.join(rest)}"


def pytest_ignore_collect(collection_path, config):
    if collection_path in APART and collection_path not in named_groups(config):
        return True
    return None
