# SPDX-License-Identifier: Apache-2.0
"""Where the kernels of these tests run: interpreted on the CPU, or compiled on a GPU."""

import os

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
