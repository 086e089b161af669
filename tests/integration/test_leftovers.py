# SPDX-License-Identifier: Apache-2.0
"""What a spechub engine leaves behind in its process: nothing that a plain engine would notice."""

import json
import subprocess
import sys

import pytest
from vllm.v1.worker.cpu_worker import CPUWorker

from helpers.engines import engine
from helpers.pair import ROOT
from vllm_spechub.integration.cpu_worker import SpecHubCPUWorker

HARMLESS = (
    # the V2 runner's kernels and hooks: without Triton vLLM refuses that runner to anyone else,
    # and the hooks hand every other configuration to the original
    "vllm.v1.worker.gpu.",
    "vllm.v1.worker.gpu_worker:warmup_kernels",
    "vllm.distributed.utils:get_pp_indices",
    # what those kernels' launchers compute block sizes with
    "vllm.triton_utils.importing:TritonPlaceholder.next_power_of_2",
)
"""Where names may change, by their beginnings."""

PROGRAM = """
import json, os, sys
import conftest
from helpers.engines import engine, greedy_params, model_runner, token_ids
from helpers.pair import PROMPTS


def names():
    # every name of vLLM's modules, and of the classes that they define
    found = {f"environ:{name}": value for name, value in os.environ.items()}
    for module in [*sys.modules.values()]:
        path = getattr(module, "__name__", "")
        if path != "vllm" and not path.startswith("vllm."):
            continue
        for name, value in [*vars(module).items()]:
            found[f"{path}:{name}"] = id(value)
            if isinstance(value, type) and value.__module__ == path:
                found |= {f"{path}:{name}.{k}": id(v) for k, v in vars(value).items()}
                found[f"{path}:{name}.__bases__"] = value.__bases__
    return found


def plain():
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends import registry

    with engine() as llm:
        layers = model_runner(llm).compilation_config.static_forward_context.values()
        # ALiBi, which trees refuse
        implementation = next(iter(layers)).get_attn_backend().get_impl_cls()
        with set_current_vllm_config(llm.llm_engine.vllm_config):
            implementation(2, 32, 1.0, 1, [0.5, 0.25], None, "auto")
        return {
            "tokens": token_ids(llm.generate(PROMPTS, greedy_params(12), use_tqdm=False)),
            "worker": str(type(model_runner(llm))),
            "backends": sorted({layer.get_attn_backend().__module__ for layer in layers}),
            "chosen": selector._cached_get_attn_backend.cache_info().currsize,
            "overrides": [str(key) for key in registry._ATTN_OVERRIDES],
        }


def changed(before, after):
    return {name for name in before if before[name] != after.get(name)}


plain()
first = names()
expected = plain()
before = names()
# what every engine sets anew, for example the kernels of vLLM's own for the CPU
by_plain = changed(first, before)
with engine("binary:3", verification="traversal") as llm:
    llm.generate(PROMPTS, greedy_params(12), use_tqdm=False)
by_trees = changed(before, names())
print(json.dumps([[expected, plain()], sorted(by_trees - by_plain)]))
"""


def test_plain_vllm_after_trees():
    """In a process of its own: the same backend, worker and answers, and vLLM's names as before."""
    path = [str(ROOT), str(ROOT / "tests")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path}\n{PROGRAM}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (before, after), changed = json.loads(done.stdout.splitlines()[-1])
    assert before == after
    assert before["backends"] == ["vllm.v1.attention.backends.cpu_attn"]
    assert before["overrides"] == []
    noticed = [name for name in changed if not name.startswith(HARMLESS)]
    assert not noticed, "\n".join(noticed)


@pytest.fixture
def workers_as_they_were():
    before = {worker: worker.__bases__ for worker in (SpecHubCPUWorker, CPUWorker)}
    yield
    for worker, bases in before.items():
        worker.__bases__ = bases


@pytest.mark.usefixtures("workers_as_they_were")
def test_a_worker_extension_that_a_plain_engine_had_before():
    """vLLM gives it for good to the plain worker's class, from which ours inherits."""
    options = {"worker_extension_cls": "helpers.worker_extension.Greeter"}
    for tree, greeting in ((None, "hello from CPUWorker"), ("chain:1", "hello from SpecHubCPU")):
        with engine(tree, **options) as llm:
            (answer,) = llm.collective_rpc("greet")
            assert answer.startswith(greeting)
