# SPDX-License-Identifier: Apache-2.0
"""The platforms that trees run on, a module with a record for each."""

from vllm_spechub.engine.platform import Platform
from vllm_spechub.integration.platforms.cpu import CPU
from vllm_spechub.integration.platforms.cuda import CUDA

PLATFORMS: dict[str, Platform] = {"cpu": CPU, "cuda": CUDA}
"""The platforms, by the names that vLLM gives its own (`current_platform.device_name`)."""
