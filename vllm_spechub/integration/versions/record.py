# SPDX-License-Identifier: Apache-2.0
"""`VllmVersion`: everything that the package must know about one version of vLLM."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_spechub.engine.grammar import MaskFormat


@dataclass(frozen=True)
class VllmVersion:
    """What one version of vLLM does in its own way.

    Attributes:
        host_kernels: returns the CPU stand-ins for kernels that changed since the oldest supported
            version, by the kernels' qualified names.
        mask_format: the grammar masks that the model runner takes.
        refusals: yields what trees do not support in this version only, as
            `refusals.engine_refusals` does.
    """

    host_kernels: Callable[[], Mapping[str, Callable[..., None]]]
    mask_format: "MaskFormat"
    refusals: Callable[["VllmConfig"], Iterator[tuple[bool, str]]]
