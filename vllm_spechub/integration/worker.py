# SPDX-License-Identifier: Apache-2.0
"""The worker for spechub configurations, which prepares vLLM before its model runner is built."""

import logging
from typing import Any

from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu_worker import Worker

from vllm_spechub.integration import patches
from vllm_spechub.integration.memory import verification_bytes
from vllm_spechub.integration.patch import apply_all
from vllm_spechub.integration.reporting import reporting
from vllm_spechub.integration.select import attention_backend, platform
from vllm_spechub.integration.startup_summary import summarize

logger = logging.getLogger("vllm.spechub")


class SpecHubWorker(Worker):
    """vLLM's GPU worker with draft trees."""

    @property
    def _v2_runner(self) -> Any:
        """The runner. vLLM's annotation says that it is a V1 runner, which lacks what we use."""
        return self.model_runner

    def init_device(self) -> None:
        platform().prepare_worker()
        apply_all(patches.WORKER)
        super().init_device()

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        with attention_backend(platform()):
            super().load_model(load_dummy_weights=load_dummy_weights)
        # vLLM connects the two only if the speculator has a model of its own.
        self._v2_runner.speculator.bind(self._v2_runner.model_state)

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """The drafts, without the nodes of which the proposer says that they are of no use.

        Only synchronous scheduling asks for them before it schedules the next step.
        """
        drafts, useful = super().take_draft_token_ids(), self._v2_runner.speculator.num_useful_nodes
        if drafts is None or useful is None or self.scheduler_config.async_scheduling:
            return drafts
        shortened = zip(drafts.draft_token_ids, useful.tolist(), strict=True)
        return DraftTokenIds(drafts.req_ids, [nodes[:count] for nodes, count in shortened])

    def determine_available_memory(self) -> int:
        """The bytes that vLLM finds, less those that verifying a full batch of trees needs, which
        vLLM's profiling run does not see."""
        available = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes:
            return available  # the user's own number
        return available - verification_bytes(self.vllm_config)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        if self.is_driver_worker:
            with reporting("the start-up summary"):
                runner = self._v2_runner
                logger.info(
                    summarize(self.vllm_config, runner.model, runner.speculator, kv_cache_config)
                )

    def wake_up(self, tags: list[str] | None = None) -> None:
        super().wake_up(tags)
        self._v2_runner.model_state.wake_up()
