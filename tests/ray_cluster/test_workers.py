# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism over Ray's workers, and nodes that cannot be workers."""

import platform
import subprocess
import sys
import time
import venv
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import psutil
import pytest
import ray
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.platforms.cpu import CpuPlatform

from helpers.pair import DRAFT, TARGET
from helpers.without_ray import ENGINE, without_ray

TREES = {"method": "spechub", "model": DRAFT, "tree": "binary:2"}
PROMPTS = [
    "def parse_header(line):\n",
    "class Reader:\n    def __init__(self, stream):\n        self",
]
pytestmark = pytest.mark.timeout(1800)  # on a busy machine Ray and its workers start slowly
GREEDY = {"temperature": 0, "max_tokens": 16}
SEEDED = {"temperature": 1, "top_p": 0.95, "seed": 3, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture
def slots(monkeypatch):
    """vLLM asks Ray for a platform's devices, and refuses the CPU because it names none.

    Here it names Ray's GPUs, of which the local cluster claims to have some. The rest is vLLM's.
    """

    def name_slots():
        from vllm.platforms.cpu import CpuPlatform

        CpuPlatform.ray_device_key = "GPU"

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setattr(CpuPlatform, "ray_device_key", "GPU")

    @contextmanager
    def cluster(count: int):
        hook = {"worker_process_setup_hook": name_slots}
        context = ray.init("local", num_gpus=count, include_dashboard=False, runtime_env=hook)
        try:
            yield context.address_info
        finally:
            ray.shutdown()

    return cluster


def two_workers() -> LLM:
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    return LLM(TARGET, speculative_config=TREES, **options, **ENGINE)


def test_two_workers_answer_as_one(slots):
    params = [GREEDY, SEEDED]
    greedy = without_ray(PROMPTS[:1], [GREEDY])
    seeded = without_ray(PROMPTS[1:], [SEEDED], speculative_config=TREES)
    with slots(2):
        llm = two_workers()
        try:
            outputs = llm.generate(PROMPTS, [SamplingParams(**p) for p in params], use_tqdm=False)
            workers = llm.collective_rpc(lambda it: (type(it.worker).__name__, it.worker.rank))
        finally:
            llm.llm_engine.engine_core.shutdown()
            cleanup_dist_env_and_memory()
    assert [output.outputs[0].text for output in outputs] == greedy + seeded
    assert workers == [("SpecHubCPUWorker", 0), ("SpecHubCPUWorker", 1)]


@pytest.fixture(scope="module")
def other_environment(tmp_path_factory):
    """Makes environments like this one, with another version of the package, or without it."""

    def make(version: str | None) -> Path:
        folder = tmp_path_factory.mktemp("environment")
        venv.create(folder, symlinks=True)
        (packages,) = folder.glob("lib/*/site-packages")
        here = [path for path in map(Path, sys.path) if path.name == "site-packages"]
        mirrors = [folder / f"packages_{i}" for i in range(len(here))]
        for path, mirror in zip(here, mirrors, strict=True):
            mirror.mkdir()
            for entry in path.iterdir():
                if "spechub" not in entry.name:
                    (mirror / entry.name).symlink_to(entry)
        (packages / "mirrors.pth").write_text("\n".join(map(str, mirrors)))
        if version is not None:
            about = packages / f"vllm_spechub-{version}.dist-info"
            about.mkdir()
            (about / "METADATA").write_text(f"Name: vllm-spechub\nVersion: {version}\n")
        return folder / "bin" / "python"

    return make


@pytest.mark.parametrize(
    ("version", "message"),
    [(None, "has no vllm-spechub"), ("0.0.9", "has vllm-spechub 0.0.9")],
    ids=["none", "other"],
)
def test_a_node_without_this_version(slots, other_environment, version, message):
    python = other_environment(version)
    with slots(1) as address:
        join = [python, "-m", "ray.scripts.scripts", "start", "--block", "--num-gpus", "1"]
        node = subprocess.Popen([*join, "--address", address["gcs_address"]], cwd="/")
        try:
            give_up = time.monotonic() + 300
            while ray.cluster_resources().get("GPU") != 2:
                assert time.monotonic() < give_up
                time.sleep(0.2)
            with pytest.raises(RuntimeError) as error:
                two_workers()
        finally:
            for process in (*psutil.Process(node.pid).children(recursive=True), node):
                process.kill()
            node.wait()
    ours = metadata.version("vllm-spechub")
    assert str(error.value) == (
        f"spechub: this is vllm-spechub {ours}, but node {platform.node()} {message}; "
        f"install vllm-spechub {ours} next to vLLM on every node"
    )
