# SPDX-License-Identifier: Apache-2.0
"""Workers for spechub configurations: they prepare the V2 model runner before it is built."""

import logging
from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu_worker import Worker

from vllm_spechub.integration import patches
from vllm_spechub.integration.classes import TRITON_BACKEND
from vllm_spechub.integration.memory import verification_bytes
from vllm_spechub.integration.patch import apply_all
from vllm_spechub.integration.startup_summary import summarize

logger = logging.getLogger("vllm.spechub")


class SpecHubWorker(Worker):
    """vLLM's GPU worker with trees."""

    def init_device(self) -> None:
        apply_all(patches.WORKER)
        # The registry is each process's own; the configuration only names the entry.
        register_backend(AttentionBackendEnum.CUSTOM, TRITON_BACKEND)
        super().init_device()

    @property
    def _v2_runner(self) -> Any:
        """vLLM's V2 model runner, where vLLM declares the V1 runner."""
        return self.model_runner

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        super().load_model(load_dummy_weights=load_dummy_weights)
        # vLLM introduces the two only where the speculator has a model of its own
        self._v2_runner.speculator.bind(self._v2_runner.model_state)

    def determine_available_memory(self) -> int:
        """vLLM's, less what its profiling run does not see of a full batch of trees."""
        available = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes:
            return available  # the user's own number
        return available - verification_bytes(self.vllm_config)

    def initialize_from_config(self, kv_cache_config) -> None:
        super().initialize_from_config(kv_cache_config)
        if self.is_driver_worker:
            logger.info(summarize(self.vllm_config, self._v2_runner.speculator, kv_cache_config))

    def wake_up(self, tags: list[str] | None = None) -> None:
        super().wake_up(tags)
        self._v2_runner.model_state.wake_up()
