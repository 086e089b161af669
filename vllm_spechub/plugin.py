# SPDX-License-Identifier: Apache-2.0
"""The entry point that vLLM loads in every process it starts."""

import logging

logger = logging.getLogger("vllm.spechub")


def register() -> None:
    """Patch vLLM for spechub configurations; harmless when called again.

    With another vLLM than the supported one nothing changes for other users: the error is kept
    for whoever asks for spechub.
    """
    from vllm_spechub.patches import PatchMismatch, apply_all, frontend, ledger

    try:
        # A worker's own patches are checked there: its modules are costly to import.
        apply_all(ledger.EVERYWHERE)
    except PatchMismatch as mismatch:
        logger.warning("%s; spechub is switched off", mismatch)
        frontend.refuse_spechub(mismatch)
