# SPDX-License-Identifier: Apache-2.0
"""The sampling and verification kernels compile for GPUs, without spilling registers."""

import subprocess
import sys

import pytest

from vllm_spechub.triton_kernels import rng
from vllm_spechub.triton_kernels.child_sampling import kernel as child_sampling
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES
from vllm_spechub.triton_kernels.verification import kernel as verification

# for a vocabulary of 128,256
LANES = {"BLOCK_SIZE": rng.LANES, "LANE_SIZE": 64}
TARGETS = [(80, "bf16"), (90, "bf16"), (90, "fp16"), (90, "fp32"), (100, "bf16")]

CHILD_SAMPLING_ARGUMENTS = {
    "tokens_ptr": "*i64",
    "sample_slot_ptr": "*i32",
    "logits_ptr": "*fp32",
    "logits_stride": "i32:16",
    "temperature_ptr": "*fp32",
    "seeds_ptr": "*i64",
    "req_idx_ptr": "*i32",
    "root_positions_ptr": "*i64",
    "node_ids_ptr": "*i32",
    "num_children_ptr": "*i32",
    "vocab_size": "i32:16",
    "sharpening": "fp32",
}
VERIFICATION_ARGUMENTS = {
    "tokens_ptr": "*i64",
    "num_emitted_ptr": "*i32",
    "path_ptr": "*i32",
    "target_logits_ptr": "*fp32",
    "target_logits_stride": "i32:16",
    "row_start_ptr": "*i32",
    "num_nodes_ptr": "*i32",
    "node_tokens_ptr": "*i64",
    "draft_logits_ptr": "*fp32",
    "draft_logits_req_stride": "i32:16",
    "draft_logits_node_stride": "i32:16",
    "sample_slots_ptr": "*i32",
    "sample_slots_stride": "i32",
    "req_idx_ptr": "*i32",
    "target_temperature_ptr": "*fp32",
    "draft_temperature_ptr": "*fp32",
    "seeds_ptr": "*i64",
    "root_positions_ptr": "*i64",
    "first_child_ptr": "*i32",
    "num_children_ptr": "*i32",
    "internal_index_ptr": "*i32",
    "max_depth": "i32",
    "vocab_size": "i32:16",
    "sharpening": "fp32",
}


@pytest.mark.parametrize(
    ("rule", "max_children", "capability", "dtype"),
    [
        ("unordered", 1, *TARGETS[1]),
        ("ordered", 2, *TARGETS[1]),
        ("ordered", 3, *TARGETS[1]),
        *((rule, 4, *target) for rule in ("ordered", "rrs", "rrsw") for target in TARGETS),
    ],
)
def test_child_sampling(compile_for, capability, dtype, rule, max_children):
    resources = compile_for(
        child_sampling._sample_children_kernel,
        CHILD_SAMPLING_ARGUMENTS | {"logits_ptr": f"*{dtype}"},
        {
            **child_sampling.constants(BUILTIN_RULES[rule]),
            "MAX_CHILDREN": max_children,
            "SHARPENED": False,
            **LANES,
        },
        capability,
        child_sampling.NUM_WARPS,
    )
    print(
        f"sample_children, {rule}, {max_children} children, {dtype}, sm_{capability}: {resources}"
    )
    assert resources.spill_bytes == 0


@pytest.mark.parametrize(
    ("rule", "sharpened", "capability", "dtype"),
    [
        *(
            (rule, False, *target)
            for rule in ("ordered", "traversal", "rrs", "rrsw")
            for target in TARGETS
        ),
        ("unordered", False, *TARGETS[1]),
        ("chain", False, *TARGETS[1]),
        ("ordered", True, *TARGETS[1]),
        ("traversal", True, *TARGETS[1]),
    ],
)
def test_verification(compile_for, capability, dtype, rule, sharpened):
    arguments = dict(VERIFICATION_ARGUMENTS)
    arguments |= dict.fromkeys(("target_logits_ptr", "draft_logits_ptr"), f"*{dtype}")
    constants = {"SHARPENED": sharpened, **LANES}
    if rule == "traversal":
        function = verification.traverse_kernel
        arguments |= {"subtree_sizes_ptr": "*i64", "num_tree_nodes": "i32"}
        constants["MAX_NODES"] = 64
    else:
        function = verification._verify_tree_kernel
        constants |= verification.constants(BUILTIN_RULES[rule])
    resources = compile_for(function, arguments, constants, capability, verification.NUM_WARPS)
    sharpness = ", sharpened" if sharpened else ""
    print(f"verify_tree, {rule}{sharpness}, {dtype}, sm_{capability}: {resources}")
    assert resources.spill_bytes == 0


def test_host_versions_need_no_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from vllm_spechub.triton_kernels import child_sampling, verification\n"
        "from vllm_spechub.triton_kernels.child_sampling import reference\n"
        "from vllm_spechub.triton_kernels.verification import reference"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
