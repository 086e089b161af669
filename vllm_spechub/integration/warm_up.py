# SPDX-License-Identifier: Apache-2.0
"""Runs at start-up what a step with any tree of the schedule runs, so that nothing compiles later.

vLLM warms up with steps of the largest tree, whose requests use every sampling parameter.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.worker import gpu_worker

from vllm_spechub.config import spechub_config


def warm_up_trees(
    runner: Any, execute_model: Callable[..., Any], sample_tokens: Callable[..., Any]
) -> None:
    """Take vLLM's steps with every other tree, then verify rows that no parameter has edited.

    Args:
        runner: the model runner, with its KV cache.
        execute_model: the worker's.
        sample_tokens: the worker's.
    """

    def sample(_grammar_output: Any) -> Any:
        """Without masks, of which there may be as many as the largest tree needs in any step."""
        return sample_tokens(None)

    # as the worker finds it, with our patch
    warmup_kernels: Callable[..., None] = vars(gpu_worker)["warmup_kernels"]
    _, *others = spechub_config(runner.vllm_config).schedule.trees
    largest = runner.num_speculative_steps, runner.decode_query_len
    try:
        for tree in others:
            runner.num_speculative_steps = tree.num_nodes
            runner.decode_query_len = 1 + tree.num_nodes
            warmup_kernels(runner, execute_model, sample)
    finally:
        runner.num_speculative_steps, runner.decode_query_len = largest
    with torch.inference_mode():
        runner.rejection_sampler.verify_nothing(
            runner.speculator.draft_logits, runner.model_config.head_dtype
        )
