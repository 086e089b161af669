# SPDX-License-Identifier: Apache-2.0
"""On a GPU: CUDA graphs, asynchronous scheduling, and nothing that makes the host wait."""

import warnings

import pytest
import torch

from helpers.engines import engine, greedy_params, model_runner, token_ids
from helpers.metrics import spec_metrics
from helpers.pair import PROMPTS, TARGET
from helpers.schedules import SCHEDULE, params

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GRAPHS = {"enforce_eager": False, "async_scheduling": True}


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "FULL_DECODE_ONLY", "FULL", "PIECEWISE"])
@pytest.mark.parametrize("tree", ["binary:3", SCHEDULE])
def test_graphs_change_no_token(tree, mode):
    with engine() as llm:
        plain = token_ids(llm.generate(PROMPTS, params(), use_tqdm=False))
    options = GRAPHS | {"compilation_config": {"cudagraph_mode": mode}}
    with engine(tree, **options) as llm:
        runner = model_runner(llm)
        assert runner.scheduler_config.async_scheduling
        answers = token_ids(llm.generate(PROMPTS, params(), use_tqdm=False))
        captured = runner.speculator.graphs
        assert (captured is not None) == ("FULL" in mode)
        if captured is not None:
            assert all(graphs.graphs for graphs in captured.by_rows.values())
    assert answers == plain


def test_a_draft_equal_to_the_target_is_accepted_whole():
    with engine("kary:2:3", draft=TARGET, **GRAPHS) as llm:
        llm.generate(PROMPTS, greedy_params(40, ignore_eos=True), use_tqdm=False)
        metrics = spec_metrics(llm)
    assert metrics["num_accepted_tokens"] > 0.97 * metrics["num_draft_tokens"]


def waits(llm) -> set[str]:
    """Where the host waits for the device while requests of every kind decode."""
    requests = [
        *params(),
        *params(temperature=1.0, seed=1),
        *params(temperature=0.8, top_p=0.9, top_k=20),
    ]
    llm.generate(PROMPTS * 3, requests, use_tqdm=False)  # compiles what it needs
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            llm.generate(PROMPTS * 3, requests, use_tqdm=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {
        f"{warning.filename}:{warning.lineno}"
        for warning in caught
        if "synchronizing CUDA operation" in str(warning.message)
    }


def test_no_wait_that_plain_vllm_lacks():
    with engine(**GRAPHS) as llm:
        plain = waits(llm)
    with engine(SCHEDULE, **GRAPHS) as llm:
        assert waits(llm) <= plain
