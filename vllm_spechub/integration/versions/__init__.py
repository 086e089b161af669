# SPDX-License-Identifier: Apache-2.0
"""The supported versions of vLLM, and what differs between them: a module with a record for each.

Whatever is written for one version only stands in its module. The rest of the package asks the
record of the running version, and never which version that is.
"""

from functools import cache
from importlib import import_module

from vllm_spechub.integration.versions.record import VllmVersion

MODULES = {"0.32.0": "v0_32", "0.33.0": "v0_33"}
"""The supported versions, oldest first, and the modules with their records."""


def supported() -> str:
    """The supported versions in words."""
    return " and ".join(MODULES)


def running() -> str:
    """The version of the running vLLM, without a local suffix such as "+cpu"."""
    import vllm

    return vllm.__version__.partition("+")[0]


@cache
def record(version: str) -> VllmVersion:
    """The record of a supported version."""
    return import_module(f"{__name__}.{MODULES[version]}").VERSION


def current() -> VllmVersion:
    """The record of the running version, which must be supported."""
    return record(running())
