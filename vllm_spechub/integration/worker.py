# SPDX-License-Identifier: Apache-2.0
"""The worker for spechub configurations, which prepares vLLM before its model runner is built."""

import logging
from typing import Any

import vllm.envs as envs
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_spechub.config import spechub_config
from vllm_spechub.integration import patches
from vllm_spechub.integration.memory import verification_bytes
from vllm_spechub.integration.messages import TreeDraftTokenIds
from vllm_spechub.integration.patch import apply_all
from vllm_spechub.integration.reporting import reporting
from vllm_spechub.integration.select import attention_backend, platform
from vllm_spechub.integration.startup_summary import summarize
from vllm_spechub.integration.warm_up import warm_up_trees

logger = logging.getLogger("vllm.spechub")


class SpecHubWorker(Worker):
    """vLLM's GPU worker with draft trees."""

    # bytes kept free for verification, beyond those that vLLM keeps free for a forward pass
    reserved_bytes = 0

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
        drafts, speculator = super().take_draft_token_ids(), self._v2_runner.speculator
        if drafts is not None and speculator.drafted_parents is not None:
            # copied before the drafts, for which vLLM has waited
            parents = speculator.drafted_parents.tolist()
            return TreeDraftTokenIds(drafts.req_ids, drafts.draft_token_ids, parents)
        useful = speculator.num_useful_nodes
        if drafts is None or useful is None or self.scheduler_config.async_scheduling:
            return drafts
        shortened = zip(drafts.draft_token_ids, useful.tolist(), strict=True)
        return DraftTokenIds(drafts.req_ids, [nodes[:count] for nodes, count in shortened])

    def determine_available_memory(self) -> int:
        """The bytes that vLLM finds, less those that verifying a full batch of trees needs beyond
        what vLLM has seen in use while it profiled a forward pass."""
        available = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes:
            return available  # the user's own number
        self.reserved_bytes = max(0, verification_bytes(self.vllm_config) - self._profiled_bytes())
        return available - self.reserved_bytes

    def _profiled_bytes(self) -> int:
        """The bytes that a forward pass takes and gives back, as vLLM has profiled it; 0 where it
        profiles none."""
        peak: int = getattr(self, "peak_activation_memory", 0)
        if envs.VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS:
            peak -= getattr(self, "cudagraph_memory_estimate", 0)  # these stay
        return peak

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        self._v2_runner.model_state.bind_compactor()
        if self.is_driver_worker:
            with reporting("the start-up summary"):
                runner, config = self._v2_runner, spechub_config(self.vllm_config)
                combination = runner.model_state.combination
                logger.info(
                    summarize(
                        self.vllm_config,
                        runner.model,
                        runner.speculator,
                        combination.members[config.reads_draft :] if combination else [],
                        kv_cache_config,
                        self.reserved_bytes,
                    )
                )

    def compile_or_warm_up_model(self) -> CompilationTimes:
        if (
            self.device_config.device_type != "cpu"
            and self.vllm_config.kernel_config.enable_jit_warmup
        ):
            warm_up_trees(self._v2_runner, self.execute_model, self.sample_tokens)
        return super().compile_or_warm_up_model()

    def wake_up(self, tags: list[str] | None = None) -> None:
        super().wake_up(tags)
        self._v2_runner.model_state.wake_up()
