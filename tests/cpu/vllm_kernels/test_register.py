# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys

PROGRAM = """
import torch
from vllm.triton_utils import HAS_TRITON
from vllm_spechub.integration.platforms.cpu import host_kernels, register_host_kernels

assert not HAS_TRITON
register_host_kernels()
register_host_kernels()

from vllm.triton_utils import dispatcher
from vllm.v1.worker.gpu import input_batch

assert set(host_kernels()) <= set(dispatcher._registry)
assert isinstance(input_batch._prepare_prefill_inputs_kernel, dispatcher.KernelOverride)
idx, local = input_batch.expand_idx_mapping(
    torch.tensor([4, 2]), 5, torch.tensor([0, 3, 5], dtype=torch.int32), 3
)
assert idx.tolist() == [4, 4, 4, 2, 2]
assert local.tolist() == [0, 1, 2, 0, 1]
"""


def test_vllm_without_triton_runs_host_kernels():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["VLLM_LOGGING_LEVEL"] = "WARNING"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "already registered" not in done.stdout + done.stderr
