# SPDX-License-Identifier: Apache-2.0
"""The memory that speculation adds, in a real engine."""

import psutil
import pytest
import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from helpers.engines import engine
from helpers.engines import worker as engine_worker
from vllm_spechub.integration import worker as worker_module
from vllm_spechub.integration.memory import weight_bytes


def test_what_is_added_is_known_before_the_cache_is_sized(monkeypatch):
    with engine("binary:3", max_num_seqs=4) as llm:
        worker = engine_worker(llm)
        speculator = worker.model_runner.speculator
        # 4 requests and a row that is nobody's; 7 nodes with children, 2048 tokens in fp32; 14
        # int64 tokens; 7 int32 slots
        assert speculator.draft_logits.num_bytes == 5 * (7 * 2048 * 4 + 14 * 8 + 7 * 4)
        assert weight_bytes(speculator.model, speculator.draft_model_config.dtype) > 4 * 300_000

        monkeypatch.setattr(worker_module, "verification_bytes", lambda _config: 1 << 30)
        asked = worker.determine_available_memory()
        assert asked == CPUWorker.determine_available_memory(worker)  # the user's own number
        worker.cache_config.kv_cache_memory_bytes = None
        worker.requested_cpu_memory = psutil.Process().memory_info().rss + (3 << 30)
        ours = worker.determine_available_memory()
        vllms = CPUWorker.determine_available_memory(worker)
        assert vllms - ours == pytest.approx(1 << 30, abs=64 << 20)  # the process itself may grow

        # As on a GPU: 3/4 of it are free after a forward pass, and graphs take another half.
        worker.peak_activation_memory, worker.cudagraph_memory_estimate = 5 << 28, 1 << 29
        worker.determine_available_memory()
        assert worker.reserved_bytes == 1 << 28


def test_what_a_head_shares_with_its_target_is_the_targets():
    target = torch.nn.ModuleDict({"embed": torch.nn.Embedding(7, 4)})
    head = torch.nn.ModuleDict({"embed": target["embed"], "norm": torch.nn.Linear(4, 4, False)})
    assert weight_bytes(head, torch.float32) == 4 * (7 * 4 + 4 * 4)
    assert weight_bytes(head, torch.float32, target) == 4 * 4 * 4
