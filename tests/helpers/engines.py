# SPDX-License-Identifier: Apache-2.0
"""Real engines, one at a time and inside the test's process, on the demo pair in fp32."""

import gc
from contextlib import contextmanager
from functools import cache
from weakref import WeakSet

import pytest

from helpers.pair import DRAFT, PROMPTS, TARGET

DEFAULTS = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 64 << 20,
    "enforce_eager": True,
    "disable_log_stats": False,
    "async_scheduling": False,
}


@contextmanager
def engine(tree=None, *, model=TARGET, draft=DRAFT, verification="ordered", spec=None, **options):
    """A vLLM engine, which is stopped at the end of the block; with spechub if a tree is given.

    `tree` may be a schedule, [[first, last, tree], ...]. `spec` holds further options of spechub;
    the other options are vLLM's.
    """
    from vllm import LLM
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel
    from vllm.distributed.parallel_state import model_parallel_is_initialized

    settings = DEFAULTS | {"model": model}
    if tree is not None:
        settings["speculative_config"] = {
            "method": "spechub",
            "model": draft,
            "tree_by_batch_size" if is_schedule(tree) else "tree": tree,
            "verification": verification,
        } | (spec or {})
    with settled_heap():
        llm, others = None, model_parallel_is_initialized()
        try:
            llm = LLM(**(settings | options))
            started.add(llm)
            yield llm
        finally:
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
            if llm is not None or not others:  # it may fail after it has made its groups
                destroy_model_parallel()
                destroy_distributed_environment()
            del llm


@contextmanager
def plain_engine(**options):
    """An engine without speculation on the V2 model runner, where spechub's engines run.

    Its noise for a seed and a position is the one that speculation with `match` must reproduce.
    """
    from vllm_spechub.integration.platforms.cpu import register_host_kernels

    register_host_kernels()
    with pytest.MonkeyPatch.context() as patch:
        # vLLM takes this runner on the CPU only with Triton, in whose place host kernels are.
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        for module in ("vllm.config.vllm", "vllm.v1.worker.gpu_worker"):
            patch.setattr(f"{module}.HAS_TRITON", True, raising=False)
        with engine(**options) as llm:
            assert type(model_runner(llm)).__module__ == "vllm.v1.worker.cpu.model_runner"
            yield llm


started = WeakSet()
"""Engines that something still holds, running or not."""


@contextmanager
def settled_heap():
    """Let the garbage collector ignore, within the block, everything that was there before.

    vLLM collects garbage a dozen times while an engine starts and stops. Searching everything that
    vLLM imports takes 6 of the 7 seconds of both; searching what an engine makes takes hardly any.
    """
    gc.collect()
    if not started:  # if frozen, an engine that a test still holds would never be collected
        gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        # vLLM freezes an engine after its start, and everything thaws when it stops.
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


def is_schedule(tree) -> bool:
    return isinstance(tree, list) and isinstance(tree[0], list)


def worker(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def model_runner(llm):
    return worker(llm).model_runner


def greedy_params(max_tokens=40, **options):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, **options)


def token_ids(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


def logprob_rows(output) -> list[dict[int, float]]:
    """The log-probabilities that were reported with each emitted and each prompt token."""
    rows = []
    for entries in (output.outputs[0].logprobs or [], output.prompt_logprobs or []):
        for i in range(len(entries)):
            row = entries[i] or {}
            rows.append({token: entry.logprob for token, entry in row.items()})
    return rows


@cache
def plain_greedy(max_tokens=40, model=TARGET):
    """What plain vLLM answers to PROMPTS at temperature 0, with its default runner."""
    with engine(model=model) as llm:
        return token_ids(llm.generate(PROMPTS, greedy_params(max_tokens), use_tqdm=False))
