# SPDX-License-Identifier: Apache-2.0
"""Workers for spechub configurations: they prepare the V2 model runner before it is built."""

from vllm.v1.worker.gpu_worker import Worker

from vllm_spechub.patches import apply_all, runner


class SpecHubWorker(Worker):
    """vLLM's GPU worker with trees."""

    def init_device(self) -> None:
        apply_all(runner.PATCHES)
        super().init_device()
