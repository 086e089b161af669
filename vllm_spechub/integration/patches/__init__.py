# SPDX-License-Identifier: Apache-2.0
"""The patch ledger: every symbol of vLLM that is replaced, by where it is applied."""

from vllm_spechub.integration.patch import Patch
from vllm_spechub.integration.patches import cpu, frontend, grammar, metrics, runner

EVERYWHERE: tuple[Patch, ...] = (
    *frontend.PATCHES,
    *cpu.PATCHES,
    *grammar.PATCHES,
    *metrics.PATCHES,
)
"""Patches for every process, applied when vLLM loads its plugins."""
WORKER: tuple[Patch, ...] = (*runner.PATCHES, *metrics.WORKER_PATCHES)
"""Patches for a worker that serves trees, applied before its model runner is built."""
ALL = (*EVERYWHERE, *WORKER)
