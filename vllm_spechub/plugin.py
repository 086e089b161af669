# SPDX-License-Identifier: Apache-2.0
"""The entry point that vLLM loads in every process it starts."""

import logging

logger = logging.getLogger("vllm.spechub")


def register() -> None:
    """Patch vLLM so that it accepts spechub configurations. Calling it again changes nothing.

    If the installed vLLM is not a supported version, this logs a warning and leaves vLLM as it
    is, except that a configuration that asks for spechub fails with the reason.
    """
    from vllm_spechub.integration.import_path import leave_triton_kernels_to_others

    leave_triton_kernels_to_others()
    from vllm_spechub.integration import patches
    from vllm_spechub.integration.patch import PatchMismatch, apply_all
    from vllm_spechub.integration.patches import frontend

    try:
        # A worker checks and applies its own patches, since the modules they touch import slowly.
        apply_all(patches.EVERYWHERE)
    except PatchMismatch as mismatch:
        logger.warning("%s; spechub is switched off", mismatch)
        frontend.refuse_spechub(mismatch)
