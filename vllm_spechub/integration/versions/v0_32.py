# SPDX-License-Identifier: Apache-2.0
"""vLLM 0.32."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm_spechub.engine.grammar import MaskFormat
from vllm_spechub.integration.versions.record import VllmVersion

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def _refusals(vllm_config: "VllmConfig") -> Iterator[tuple[bool, str]]:
    import vllm.envs as envs

    yield (
        vllm_config.parallel_config.distributed_executor_backend == "ray"
        and not envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND,
        "VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0 is set, but spechub supplies an executor of the newer "
        "kind; unset it",
    )


VERSION = VllmVersion(
    host_kernels=dict,
    mask_format=MaskFormat(fixed_rows=False, masked_while_reasoning=lambda manager, request: ()),
    refusals=_refusals,
)
