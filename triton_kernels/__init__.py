# SPDX-License-Identifier: Apache-2.0
"""Kernels of SpecHub tree speculation, usable without vLLM.

There is one folder per operation: `kernel.py` (Triton), `reference.py` (plain PyTorch, which the
kernels must reproduce) and `__init__.py`, which checks the arguments and calls the kernel for CUDA
tensors, else the reference. The CPU versions that an engine runs are compiled by Numba and live in
`vllm_spechub/cpu/tree_kernels`. Nothing here imports Triton before a kernel is first launched.
"""
