# SPDX-License-Identifier: Apache-2.0
"""The kernels that the rules run: compiled by Numba on the CPU, Triton's elsewhere.

Rules import it when they first draw, so that naming a rule costs no compiler.
"""

from vllm.platforms import current_platform

if current_platform.is_cpu():
    from vllm_spechub.host_kernels.tree_sampling import (
        sample_children,
        verify_tree,
        write_children,
    )
else:
    from vllm_spechub.drafting import DraftState
    from vllm_spechub.triton_kernels.child_sampling import sample_children
    from vllm_spechub.triton_kernels.verification import verify_tree

    write_children = DraftState.write_children

__all__ = ["sample_children", "verify_tree", "write_children"]
