# SPDX-License-Identifier: Apache-2.0
"""Two workers, each with half of every layer, decide alike; what happens when one dies; and two
engines behind one front end."""

import asyncio
import multiprocessing
import os
import signal
from contextlib import contextmanager

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from helpers.engines import engine, greedy_params, plain_greedy, token_ids
from helpers.ensembles import greedy_ensemble
from helpers.heads import Oracle
from helpers.metrics import spec_metrics
from helpers.oracle import tokens_of
from helpers.pair import DRAFT, EAGLE3, EXIT_TARGET, NESTED, PROMPTS, TARGET

TREE = "binary:2"
COMBINED = {"type": "logits", "weight": 0.5, "members": [{"model": EXIT_TARGET, "weight": -0.5}]}
OFF = {"extra_args": {"target_distribution": "off"}}


def seeded_params(**others):
    sampled = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 12, "ignore_eos": True, **others}
    return [SamplingParams(seed=seed, **sampled) for seed in range(len(PROMPTS))]


@pytest.fixture
def one_core_each(monkeypatch):
    """For workers that are processes of their own."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Workers of an engine in this process have what it has imported. vLLM would let each import it
    # anew, which takes most of a test's time. No thread is running that a fork would lack.
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr("vllm.v1.executor.multiproc_executor.get_mp_context", lambda: fork)


@contextmanager
def two_workers(tree=TREE, asked=None, **options):
    """An engine of two workers that draws the same tokens on both of them: greedily those of plain
    vLLM, and with seeds those of one worker. Requests have the sampling parameters `asked`, too."""
    expected = plain_greedy(**{key: options[key] for key in options.keys() & {"model"}})
    asked = asked or {}
    with engine(tree, **options) as llm:
        seeded = token_ids(llm.generate(PROMPTS, seeded_params(**asked), use_tqdm=False))

    options |= {
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "worker_extension_cls": "helpers.decisions.DecisionRecorder",
    }
    with engine(tree, **options) as llm:
        llm.collective_rpc("record_decisions")
        llm.collective_rpc("record_draft_rows")
        assert token_ids(llm.generate(PROMPTS, seeded_params(**asked), use_tqdm=False)) == seeded
        greedy = greedy_params(16, **asked)
        answers = token_ids(llm.generate(PROMPTS[:4], greedy, use_tqdm=False))
        assert answers == [answer[:16] for answer in expected[:4]]
        assert spec_metrics(llm)["num_accepted_tokens"] > 20
        first, second = llm.collective_rpc("recorded_decisions")
        assert len(first) > 10
        assert first == second
        yield llm


def assert_rows_of_both_workers(llm, oracle):
    for rows in llm.collective_rpc("recorded_draft_rows", args=(8,)):
        assert len({len(path) for _, path, _ in rows}) > 1
        for text, path, logits in rows:
            expected = oracle.row(text, path)
            torch.testing.assert_close(torch.tensor(logits), expected, atol=2e-4, rtol=1e-4)


def test_tensor_parallelism(one_core_each):
    """Both ranks hold a half of all models, and combine gathered rows if a request asks for it."""
    spec, prompts = {"target_distribution": COMBINED}, PROMPTS[:3]
    with two_workers(asked=OFF, draft=DRAFT, spec=spec) as llm:
        answers = token_ids(llm.generate(prompts, greedy_params(16), use_tqdm=False))
        assert answers == [greedy_ensemble(tokens_of(each), COMBINED, 16)[0] for each in prompts]
        workers = llm.llm_engine.engine_core.engine_core.model_executor.workers
        os.kill(workers[1].proc.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"[Ee]xecutor|[Ww]orker|cancelled"):
            llm.generate(PROMPTS, greedy_params(), use_tqdm=False)


def test_tensor_parallelism_of_a_head(one_core_each):
    """The head is split like its target, and its small vocabulary is gathered on every rank. Each
    decides the same trees."""
    with two_workers("levels:3,2", draft=EAGLE3) as llm:
        assert_rows_of_both_workers(llm, Oracle("eagle3", EAGLE3))


@pytest.mark.parametrize(
    ("draft", "spec"),
    [
        pytest.param(None, {"proposer": "early_exit", "exit_layer": 2}, id="early exit"),
        pytest.param(NESTED, {"draft_layers": 6}, id="nested draft"),
    ],
)
def test_tensor_parallelism_of_first_layers(one_core_each, draft, spec):
    """The target's, whose cache is split, and a draft's. Both ranks decide the same trees."""
    with two_workers(model=EXIT_TARGET, draft=draft, spec=spec):
        pass


def test_data_parallelism(one_core_each, monkeypatch):
    """Dense models run as engines of their own, which know nothing of each other."""
    expected = plain_greedy()
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    # else vLLM 0.33 wants a memory node for each rank, and many machines have one
    monkeypatch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "0")
    args = AsyncEngineArgs(
        model=TARGET,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=4,
        enforce_eager=True,
        kv_cache_memory_bytes=32 << 20,
        data_parallel_size=2,
        speculative_config={"method": "spechub", "model": DRAFT, "tree": TREE},
    )

    async def answer(llm, i: int, rank: int) -> list[int]:
        stream = llm.generate(
            PROMPTS[i], greedy_params(16), request_id=f"{i}-{rank}", data_parallel_rank=rank
        )
        return [list(output.outputs[0].token_ids) async for output in stream][-1]

    async def answers() -> list[list[int]]:
        llm = AsyncLLM.from_engine_args(args)
        try:
            return await asyncio.gather(*(answer(llm, i, rank) for i in (0, 2) for rank in (0, 1)))
        finally:
            llm.shutdown()

    assert asyncio.run(answers()) == [expected[i][:16] for i in (0, 0, 2, 2)]
