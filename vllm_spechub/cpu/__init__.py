# SPDX-License-Identifier: Apache-2.0
"""What a machine without a Triton compiler needs: stand-ins for vLLM's kernels, and our own."""
