# SPDX-License-Identifier: Apache-2.0
"""Looks at everything.

Kernels run in one process and engines in others, so that whatever brings one of them down is a
finding like any other, and this process never touches the device.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from vllm_spechub.measure.doctor.engines import check_engines
from vllm_spechub.measure.doctor.finding import Finding
from vllm_spechub.measure.doctor.kernels import check_kernels
from vllm_spechub.measure.doctor.machine import check_machine


def examine(full: bool) -> Iterator[Finding]:
    """Look at everything, the quickest first.

    Args:
        full: also time the kernels at the sizes of real models.
    """
    yield from check_machine()
    yield from check_kernels(full)
    with tempfile.TemporaryDirectory() as folder:
        yield from check_engines(Path(folder))
