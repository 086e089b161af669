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

INTERPRETED = ("kernels", "cpu/vllm_kernels")
"""Folders whose tests need Triton's interpreter, which is a whole process's."""


def pytest_collection_modifyitems(items):
    tests = Path(__file__).parent
    groups = set()
    for item in items:
        folder = item.path.parent.relative_to(tests).as_posix()
        groups.add(folder if folder in INTERPRETED else "")
    if len(groups) > 1:
        raise pytest.UsageError(
            "tests/kernels, tests/cpu/vllm_kernels and all others need a process each; "
            "scripts/test.sh runs them one after the other"
        )
