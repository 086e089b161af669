# SPDX-License-Identifier: Apache-2.0
"""Kernels of SpecHub tree speculation, usable without vLLM.

One folder per operation: `kernel.py` (Triton), `reference.py` (plain PyTorch, also the host
version) and `__init__.py`, which validates its arguments and dispatches on the tensors' device.
Nothing here imports Triton before a kernel is first launched.
"""
