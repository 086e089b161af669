# SPDX-License-Identifier: Apache-2.0
"""Which implementations of the tree kernels the engine's rules run."""

from vllm.platforms import current_platform

from vllm_spechub.rules.base import TreeKernels
from vllm_spechub.rules.kernel_rule import PORTABLE_KERNELS


def tree_kernels() -> TreeKernels:
    """Compiled by Numba on the CPU, Triton's elsewhere."""
    if not current_platform.is_cpu():
        return PORTABLE_KERNELS
    # imported late: Numba is a CPU engine's alone
    from vllm_spechub.cpu.tree_kernels.sampling import (
        sample_children,
        verify_tree,
        write_children,
    )

    return TreeKernels(sample_children, verify_tree, write_children)
