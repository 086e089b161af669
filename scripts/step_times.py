# SPDX-License-Identifier: Apache-2.0
"""The processor time of an engine's steps, and what they emit.

An engine runs in this process, on one core, and the processor time of its steps counts, so that
other work on the machine makes little difference.
"""

import gc
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

PAIR = Path(__file__).parent / "demo_pair"


class Setting(NamedTuple):
    """What an engine is asked for."""

    batch: int
    temperature: float = 1.0


class Steps(NamedTuple):
    """Steps that decode all requests."""

    # the median processor time
    ms: float
    # the mean for each request
    tokens: float


def steps(
    target: str,
    config: dict[str, Any] | None,
    settings: Sequence[Setting],
    tokens: int,
    number: int = 0,
) -> dict[Setting, Steps]:
    """The steps of an engine in several settings.

    Args:
        target: a folder of the demo pair.
        config: the speculative configuration, with the draft's folder as `model`; None for plain
            vLLM.
        settings: numbers of requests, and temperatures.
        tokens: for each request.
        number: of the repetition. Each goes on with other prompts, and has seeds of its own.
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel
    from vllm.sampling_params import RequestOutputKind

    if config is not None:
        config = {"method": "spechub", **config}
        if "model" in config:
            config["model"] = str(PAIR / config["model"])
    llm = LLM(
        str(PAIR / target),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=max(setting.batch for setting in settings),
        kv_cache_memory_bytes=128 << 20,
        enforce_eager=True,
        async_scheduling=False,
        enable_prefix_caching=False,
        speculative_config=config,
    )
    lines = (PAIR / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["turns"][0] for line in lines]
    engine, found = llm.llm_engine, {}
    for setting in settings:
        batch, temperature = setting
        params = SamplingParams(
            temperature=temperature,
            seed=number,
            max_tokens=tokens,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        for i in range(batch):
            prompt = prompts[(number * batch + i) % len(prompts)]
            engine.add_request(f"{batch}-{temperature}-{i}", prompt, params)
        times, emitted = [], []
        while engine.get_num_unfinished_requests() == batch:
            before = time.process_time()
            outputs = engine.step()
            times.append(time.process_time() - before)
            emitted.append(sum(len(output.outputs[0].token_ids) for output in outputs))
        # The first step read the prompts, and the last may have ended before a request's path did.
        found[setting] = Steps(1000 * median(times[2:]), mean(emitted[2:-1]) / batch)
        while engine.has_unfinished_requests():
            engine.step()
    engine.engine_core.shutdown()
    del llm, engine
    destroy_model_parallel()
    destroy_distributed_environment()
    gc.collect()
    return found
