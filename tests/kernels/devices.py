# SPDX-License-Identifier: Apache-2.0
"""Where the kernels of these tests run: interpreted on the CPU, or compiled on a GPU."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    DEVICE = "cpu"
elif torch.cuda.is_available():
    DEVICE = "cuda"
else:
    raise pytest.UsageError("tests/kernels need a GPU, or TRITON_INTERPRET=1")
