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
"""In every process, when vLLM loads its plugins."""
WORKER: tuple[Patch, ...] = (*runner.PATCHES, *metrics.WORKER_PATCHES)
"""In a worker that serves trees, before its model runner is built."""
ALL = (*EVERYWHERE, *WORKER)
