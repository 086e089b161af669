# SPDX-License-Identifier: Apache-2.0
"""The entry point that vLLM loads in every process it starts."""

import logging

logger = logging.getLogger("vllm.spechub")


def register() -> None:
    """Patch vLLM for spechub configurations; harmless when called again.

    With another vLLM than the supported one nothing changes for other users: the error is kept
    for whoever asks for spechub.
    """
    from vllm_spechub.integration.import_path import leave_triton_kernels_to_others

    leave_triton_kernels_to_others()
    from vllm_spechub.integration import patches
    from vllm_spechub.integration.patch import PatchMismatch, apply_all
    from vllm_spechub.integration.patches import frontend

    try:
        # A worker's own patches are checked there: its modules are costly to import.
        apply_all(patches.EVERYWHERE)
    except PatchMismatch as mismatch:
        logger.warning("%s; spechub is switched off", mismatch)
        frontend.refuse_spechub(mismatch)
