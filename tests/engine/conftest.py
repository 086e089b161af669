# SPDX-License-Identifier: Apache-2.0
"""Real engines, one at a time and inside the test's process, on the demo pair in fp32."""

import gc
import os
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import pytest
import torch

PAIR = Path(__file__).parents[2] / "scripts" / "demo_pair"
TARGET, DRAFT = str(PAIR / "target"), str(PAIR / "draft")

DEFAULTS = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 64 << 20,
    "enforce_eager": True,
    "disable_log_stats": False,
    "async_scheduling": False,
}
PROMPTS = [
    "def parse_header(line):\n",
    "x",
    "class Reader:\n    def __init__(self, stream):\n        self",
    'import os\nimport sys\n\n\ndef main():\n    """Run the',
    "    for key, value in sorted(items):\n        if key not in self._cache",
    "# Copyright (C) 2001 Python Software Foundation\n# Author: " + "a, b, c = 1, 2, 3\n" * 9,
]


@contextmanager
def engine(tree=None, *, model=TARGET, draft=DRAFT, verification="ordered", spec=None, **options):
    """A vLLM engine, gone again at the end of the block; with spechub if a tree is given.

    `tree` may be a schedule, [[first, last, tree], ...]. `spec` are more of spechub's options, the
    others are vLLM's.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends import registry

    from vllm_spechub.integration import patches as ledger
    from vllm_spechub.integration.patch import apply_all

    # A test that is collected may import Numba, over which a plain engine's start would stumble.
    apply_all(ledger.CPU_WORKER)
    # Plain vLLM runs on its own backend, whatever engine ran here before.
    registry._ATTN_OVERRIDES.pop(registry.AttentionBackendEnum.CPU_ATTN, None)
    selector._cached_get_attn_backend.cache_clear()
    settings = DEFAULTS | {"model": model}
    if tree is not None:
        settings["speculative_config"] = {
            "method": "spechub",
            "model": draft,
            "tree_by_batch_size" if is_schedule(tree) else "tree": tree,
            "verification": verification,
        } | (spec or {})
    llm = LLM(**(settings | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def is_schedule(tree) -> bool:
    return isinstance(tree, list) and isinstance(tree[0], list)


def model_runner(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def greedy_params(max_tokens=40, **options):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, **options)


def token_ids(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


def spec_metrics(llm) -> dict:
    """vLLM's counters of speculative decoding, by their short names."""
    metrics = {}
    for metric in llm.get_metrics():
        if "spec_decode" in metric.name:
            value = getattr(metric, "values", None) or metric.value
            metrics[metric.name.removeprefix("vllm:spec_decode_")] = value
    return metrics


@cache
def plain_greedy(max_tokens=40):
    """What plain vLLM answers to PROMPTS at temperature 0, with its default runner."""
    with engine() as llm:
        return token_ids(llm.generate(PROMPTS, greedy_params(max_tokens), use_tqdm=False))


@cache
def reference_model():
    """The target in transformers, fp32: the oracle for rows and caches."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def async_scheduling(monkeypatch):
    """As engines are by default. Other tests look at steps, each of which is to be looked at."""
    monkeypatch.setitem(DEFAULTS, "async_scheduling", True)


@dataclass
class Node:
    """One verified row of one step."""

    req_id: str
    root_position: int
    path_tokens: tuple[int, ...]  # drafted tokens from the root's child down to this node
    logits: torch.Tensor
    processed: torch.Tensor
    temperature: float  # what the processed row is still to be divided by


@contextmanager
def recorded_nodes():
    """Every row that is verified inside the block."""
    from vllm_spechub.engine.sampler import TreeRejectionSampler

    nodes: list[Node] = []
    process = TreeRejectionSampler.process

    def spy(self, logits, batch):
        raw = logits.clone()
        processed, temperature = process(self, logits, batch)
        trees = self.request_trees.trees_for(batch.idx_mapping_np)
        for r, (req_id, tree) in enumerate(zip(batch.req_ids, trees, strict=True)):
            start, end = batch.cu_num_logits_np[r : r + 2]
            rows = batch.logits_indices[start:end]
            tokens, root = batch.input_ids[rows].tolist(), int(batch.positions[rows[0]])
            remaining = float(temperature[batch.idx_mapping[r]])
            for node in range(end - start if end - start > 1 else 0):
                path = tuple(tokens[i] for i in tree.paths[node][1:])
                row = processed[start + node].clone()
                nodes.append(Node(req_id, root, path, raw[start + node], row, remaining))
        return processed, temperature

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TreeRejectionSampler, "process", spy)
        yield nodes


def request_of(req_id: str) -> str:
    """vLLM appends a random suffix to a request's id inside the engine."""
    return req_id.rpartition("-")[0]
