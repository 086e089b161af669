# SPDX-License-Identifier: Apache-2.0
"""The CPU worker for spechub configurations."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_spechub.integration.worker import SpecHubWorker


class SpecHubCPUWorker(SpecHubWorker, CPUWorker):
    """vLLM's CPU worker with draft trees."""
