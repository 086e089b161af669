# SPDX-License-Identifier: Apache-2.0
"""The CPU worker for spechub configurations."""

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_spechub.integration.worker import SpecHubWorker


class SpecHubCPUWorker(SpecHubWorker, CPUWorker):
    """vLLM's CPU worker with draft trees."""

    _constructed = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._constructed = True

    @property
    def use_v2_model_runner(self) -> bool:
        """Whether the worker runs the V2 model runner. It always does, but vLLM's constructor is
        not told, because it refuses that without Triton."""
        return self._constructed

    @use_v2_model_runner.setter
    def use_v2_model_runner(self, chosen: bool) -> None:
        """Do nothing: a spechub configuration has no other choice."""
