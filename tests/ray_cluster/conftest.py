# SPDX-License-Identifier: Apache-2.0
"""The tests on a local Ray cluster share it. They need the extra `ray`: `pip install .[ray]`."""

import os

import pytest

for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
    os.environ.pop(name, None)  # engines run as a user's do

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    """The address of a local cluster."""
    context = ray.init("local", num_cpus=8, include_dashboard=False)
    yield context.address_info["address"]
    ray.shutdown()
