# SPDX-License-Identifier: Apache-2.0
"""Two workers, each with half of every layer, decide alike; and what happens when one dies."""

import os
import signal
import sys
from pathlib import Path

import pytest
from conftest import PROMPTS, engine, greedy_params, plain_greedy, spec_metrics, token_ids
from vllm import SamplingParams

TREE = "binary:2"
SEEDED = [
    SamplingParams(temperature=1.0, top_p=0.95, seed=seed, max_tokens=12, ignore_eos=True)
    for seed in range(len(PROMPTS))
]


def test_tensor_parallelism(monkeypatch):
    expected = plain_greedy()
    with engine(TREE) as llm:
        seeded = token_ids(llm.generate(PROMPTS, SEEDED, use_tqdm=False))

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # one core for each
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # the workers are processes of their own and import `decisions` from here
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    monkeypatch.setenv("PYTHONPATH", path)
    options = {
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "worker_extension_cls": "decisions.DecisionRecorder",
    }
    with engine(TREE, **options) as llm:
        llm.collective_rpc("record_decisions")
        assert token_ids(llm.generate(PROMPTS, SEEDED, use_tqdm=False)) == seeded
        answers = token_ids(llm.generate(PROMPTS[:4], greedy_params(16), use_tqdm=False))
        assert answers == [answer[:16] for answer in expected[:4]]
        assert spec_metrics(llm)["num_accepted_tokens"] > 20
        first, second = llm.collective_rpc("recorded_decisions")
        assert len(first) > 10
        assert first == second

        workers = llm.llm_engine.engine_core.engine_core.model_executor.workers
        os.kill(workers[1].proc.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"[Ee]xecutor|[Ww]orker|cancelled"):
            llm.generate(PROMPTS, greedy_params(), use_tqdm=False)
