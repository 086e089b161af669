# SPDX-License-Identifier: Apache-2.0
"""The classes of ours that a configuration names, as vLLM imports them: by their paths."""

WORKERS = {
    "cpu": "vllm_spechub.integration.cpu_worker.SpecHubCPUWorker",
    "cuda": "vllm_spechub.integration.worker.SpecHubWorker",
}
SCHEDULERS = {
    False: "vllm_spechub.integration.scheduler.TreeScheduler",
    True: "vllm_spechub.integration.scheduler.AsyncTreeScheduler",
}
VLLM_WORKERS = {
    "auto",
    "vllm.v1.worker.cpu_worker.CPUWorker",
    "vllm.v1.worker.gpu_worker.Worker",
}

TRITON_BACKEND = "vllm_spechub.attention.triton_backend.TritonTreeBackend"
