# SPDX-License-Identifier: Apache-2.0
"""Start-up runs whatever a kernel is compiled for, here noted by what a launch depends on."""

import pytest
from vllm.v1.worker import gpu_worker

from helpers.engines import engine, model_runner, worker
from helpers.pair import PROMPTS
from helpers.schedules import SCHEDULE, params
from vllm_spechub.engine.compaction import PathCompactor
from vllm_spechub.integration.warm_up import warm_up_trees
from vllm_spechub.proposers.model_proposer import ModelProposer
from vllm_spechub.rules.kernel_rule import KernelRule


@pytest.fixture
def launched(monkeypatch):
    found: set[tuple] = set()
    sample, verify, compact = KernelRule.sample_children, KernelRule.verify, PathCompactor.__call__

    def sample_children(self, logits, level, requests, state):
        found.add(("sample", level.max_children, logits.dtype, logits.stride(0)))
        sample(self, logits, level, requests, state)

    def verify_tree(self, target, requests, state):
        found.add(("verify", state.tree, target.logits.dtype, target.node_tokens.dtype))
        return verify(self, target, requests, state)

    def compact_path(self, root_positions, path):
        found.add(("compact", path.shape[1], path.stride(0)))
        compact(self, root_positions, path)

    monkeypatch.setattr(KernelRule, "sample_children", sample_children)
    monkeypatch.setattr(KernelRule, "verify", verify_tree)
    monkeypatch.setattr(PathCompactor, "__call__", compact_path)
    return found


def test_nothing_new_is_launched_in_service(launched):
    with engine(SCHEDULE, verification="traversal", dtype="bfloat16") as llm:
        launched.clear()
        runner, ours = model_runner(llm), worker(llm)
        for warm_up in (warm_up_trees, gpu_worker.warmup_kernels):  # as on a GPU
            warm_up(runner, ours.execute_model, ours.sample_tokens)
        at_start = set(launched)
        launched.clear()
        for options in ({}, {"temperature": 1.0, "seed": 1}, {"repetition_penalty": 1.2}):
            llm.generate(PROMPTS, params(**options), use_tqdm=False)
    # each tree's children, rows as they are and edited, and paths
    assert len(launched) == 8
    assert launched <= at_start


def test_warm_up_keeps_to_the_budget(monkeypatch):
    """The draft reads a row more per request than the target, whose rows fill it."""
    widths = []
    run_pass = ModelProposer.run_pass

    def recorded(self, step, tokens, *args):
        widths.append(len(tokens))
        return run_pass(self, step, tokens, *args)

    with engine("binary:2", max_num_batched_tokens=32, max_num_seqs=4) as llm:
        monkeypatch.setattr(ModelProposer, "run_pass", recorded)
        runner, ours = model_runner(llm), worker(llm)
        gpu_worker.warmup_kernels(runner, ours.execute_model, ours.sample_tokens)
        assert runner.scheduler_config.max_num_seqs == 4
    assert 3 * 9 <= max(widths) <= 32
