# SPDX-License-Identifier: Apache-2.0
"""Kernels compile for GPUs, without spilling registers. Without a GPU, ahead of time.

Some cases are always compiled, and all where what is compiled has changed: see `conftest`.
"""

import itertools
import subprocess
import sys

import pytest
import torch
import triton

from vllm_spechub.triton_kernels import lanes_device, rng
from vllm_spechub.triton_kernels.child_sampling import kernel as child_sampling
from vllm_spechub.triton_kernels.compaction.kernel import ELEMENT_BITS, _compact_kernel
from vllm_spechub.triton_kernels.level_allocation import kernel as level_allocation
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES
from vllm_spechub.triton_kernels.step_inputs import kernel as step_inputs
from vllm_spechub.triton_kernels.tree_attention.kernel import (
    MERGED_ROWS,
    _merge_splits_kernel,
    _tree_attention_kernel,
    launch_config,
)
from vllm_spechub.triton_kernels.verification import kernel as verification


def with_rest(cases: list, always: list) -> list:
    """The cases, of which those that are not always compiled are marked."""
    assert all(case in cases for case in always)
    marks = {True: (), False: pytest.mark.all_targets}
    return [pytest.param(*case, marks=marks[case in always]) for case in cases]


PASS_WARPS = lanes_device.PASS_WARPS
MOST_INSTRUCTIONS = 9.0
"""Of a pass, for each element of a row that it loads."""
VOCAB_SIZE = 128_256
LANES = {
    "LANES": rng.LANES,
    "SPLITS": 16,
    "PLACES": triton.next_power_of_2(triton.cdiv(VOCAB_SIZE, rng.LANES)),
}
TARGETS = [(80, "bf16"), (90, "bf16"), (90, "fp16"), (90, "fp32"), (100, "bf16")]
HOPPER = TARGETS[1]

TYPES = {
    **dict.fromkeys(("tokens_ptr", "seeds_ptr", "root_positions_ptr", "node_tokens_ptr"), "*i64"),
    **dict.fromkeys(
        ("temperature_ptr", "target_temperature_ptr", "draft_temperature_ptr"), "*fp32"
    ),
    **dict.fromkeys(("visit_ptr", "leave_ptr", "record_ptr", "sums_ptr"), "*fp32"),
    **dict.fromkeys(("left_ptr", "entries_ptr", "lanes_ptr"), "*fp32"),
    **dict.fromkeys(("shares_ptr", "reach_ptr"), "*fp32"),
    "masks_ptr": "*i64",
    **dict.fromkeys(("vocab_size", "logits_stride", "target_logits_stride"), "i32:16"),
    **dict.fromkeys(("draft_logits_req_stride", "draft_logits_node_stride"), "i32:16"),
    **dict.fromkeys(("kept_req_stride", "kept_node_stride"), "i32:16"),
    "sharpening": "fp32",
}
"""What is neither a pointer to int32 nor an int32."""


def signature_of(kernel, constexprs, dtype) -> dict[str, str]:
    """Types as launched, for float16-like logits of `dtype`."""
    signature = {}
    for name in kernel.arg_names:
        if name in constexprs:
            continue
        if name.endswith(("logits_ptr", "kept_ptr")):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = TYPES.get(name, "*i32" if name.endswith("_ptr") else "i32")
    return signature


def compile_lanes(compile_for, kernel, constexprs, capability, dtype, what, num_warps=None):
    """Compiles a kernel that reads rows by lanes, and prints what an element costs. Without a
    number of warps the kernel is one that passes over rows."""
    names = [name for name in LANES if name in kernel.arg_names]
    constexprs = constexprs | {name: LANES[name] for name in names}
    signature = signature_of(kernel, constexprs, dtype)
    resources = compile_for(kernel, signature, constexprs, capability, num_warps or PASS_WARPS)
    size = {"fp32": 4}.get(dtype, 2)
    loops = [loop.instructions / (loop.load_bytes / size) for loop in resources.loops]
    print(
        f"{what}, {dtype}, sm_{capability}: {resources}; instructions per element: "
        + ", ".join(f"{cost:.1f}" for cost in loops)
    )
    assert resources.spill_bytes == 0
    if num_warps is None and size == 2:
        assert loops
        assert max(loops) <= MOST_INSTRUCTIONS
        # every thread of a warp loads 128 bits at once
        assert all(loop.load_bytes % 16 == 0 for loop in resources.loops)


SMALL = ("outcome", "walk", "last_token")


def sampling_constexprs(rule: str, max_children: int, sharpened: bool = False) -> dict[str, object]:
    row = BUILTIN_RULES[rule]
    never, always, confident = row.hubs.value
    return {
        "NEVER_HUBS": never,
        "ALWAYS_HUBS": always,
        "CONFIDENT_HUBS": confident,
        "REPLACES": row.replaces,
        "RANKED": row.ranks_subtrees,
        "MAX_CHILDREN": max_children,
        "SHARPENED": sharpened,
    }


@pytest.mark.parametrize(
    ("rule", "max_children", "sharpened", "capability", "dtype"),
    with_rest(
        [
            ("unordered", 1, False, *HOPPER),
            ("traversal", 2, False, *HOPPER),
            ("traversal", 4, True, *HOPPER),
            ("mixed", 3, False, *HOPPER),
            ("match", 4, False, *HOPPER),
            *(
                (rule, 4, False, *target)
                for rule in ("traversal", "mixed", "rrs", "rrsw")
                for target in TARGETS
            ),
        ],
        always=[("traversal", 4, False, *HOPPER), ("mixed", 4, False, *HOPPER)],
    ),
)
def test_drawing_children(compile_for, rule, max_children, sharpened, capability, dtype):
    constexprs = sampling_constexprs(rule, max_children, sharpened)
    kernel = child_sampling._sample_children_kernel
    what = f"sample_children, {rule}, {max_children} children{', sharpened' * sharpened}"
    warps = child_sampling.NUM_WARPS
    compile_lanes(compile_for, kernel, constexprs, capability, dtype, what, warps)


EVERYWHERE = with_rest([*TARGETS], always=[TARGETS[0], HOPPER, TARGETS[4]])


@pytest.mark.parametrize(
    ("sharpened", "capability", "dtype"),
    with_rest(
        [*((False, *target) for target in TARGETS), (True, *HOPPER)], always=[(False, *HOPPER)]
    ),
)
def test_sums_of_draft_rows(compile_for, sharpened, capability, dtype):
    constexprs = {"SHARPENED": sharpened, "KEPT": True}
    what = f"lane sums{', sharpened' * sharpened}"
    kernel = child_sampling.lane_sums_kernel
    compile_lanes(compile_for, kernel, constexprs, capability, dtype, what)


@pytest.mark.parametrize(
    ("width", "capability", "dtype"),
    with_rest(
        [*((10, *target) for target in (TARGETS[0], *TARGETS[1::3])), (1, *HOPPER), (63, *HOPPER)],
        always=[(10, *HOPPER)],
    ),
)
def test_deciding_a_level(compile_for, width, capability, dtype):
    """The largest probabilities of a row, and who gets how many children."""
    kernel, warps = level_allocation._top_shares_kernel, child_sampling.NUM_WARPS
    compile_lanes(compile_for, kernel, {}, capability, dtype, "top shares", warps)
    constexprs = sampling_constexprs("mixed", 4)
    constexprs = {name: constexprs[name] for name in constexprs if name.endswith("HUBS")}
    constexprs |= {"RANKED": True, "MOST": 4, "WIDTH": triton.next_power_of_2(width)}
    kernel, what = level_allocation._allocate_kernel, f"allocation of {width} nodes"
    compile_lanes(compile_for, kernel, constexprs, capability, dtype, what, 1)


@pytest.mark.parametrize(("capability", "dtype"), EVERYWHERE)
def test_statistics(compile_for, capability, dtype):
    kernel = verification._statistics_kernel
    compile_lanes(compile_for, kernel, {}, capability, dtype, "statistics")


@pytest.mark.parametrize(("capability", "dtype"), EVERYWHERE)
def test_residual(compile_for, capability, dtype):
    kernel = verification._residual_kernel
    compile_lanes(compile_for, kernel, {"LEAF_TO_ROOT": True}, capability, dtype, "residual")


@pytest.mark.parametrize(
    ("name", "leaf_to_root", "capability", "dtype"),
    with_rest(
        [
            *(("race", True, *target) for target in TARGETS),
            *((name, True, *target) for name in SMALL for target in (TARGETS[0], *TARGETS[1::3])),
            *((name, False, *HOPPER) for name in ("race", *SMALL)),
        ],
        always=[("race", True, *HOPPER), *((name, True, *HOPPER) for name in SMALL)],
    ),
)
def test_deciding(compile_for, name, leaf_to_root, capability, dtype):
    """The kernels that read sums, and the race for the last token."""
    kernel = getattr(verification, f"_{name}_kernel")
    constexprs = {"LEAF_TO_ROOT": leaf_to_root}
    if name == "outcome":
        constexprs["REPLACES"] = not leaf_to_root
    what = f"{name}, {'leaf to root' if leaf_to_root else 'root to leaf'}"
    warps = None if name == "race" else 1
    compile_lanes(compile_for, kernel, constexprs, capability, dtype, what, warps)


NUMBERS = ("num_reqs", "window", "more", "min_tiles")
TRITON_TYPE = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def attention_job(
    dtype,
    head_size,
    group_size,
    max_query_len,
    softcap=False,
    window=False,
    fp8=False,
    sinks=False,
    capability=90,
):
    """Signature, constexprs and options as `tree_attention_triton` launches."""
    config = launch_config(dtype, head_size, group_size, max_query_len, capability // 10)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    constexprs = {
        "BLOCK_SIZE": 16,
        "HEAD_SIZE": head_size,
        "HEAD_PADDED": 1 << (head_size - 1).bit_length(),
        "GROUP_SIZE": group_size,
        "BLOCK_Q": config["BLOCK_M"] // group_size,
        "USE_SOFTCAP": softcap,
        "USE_WINDOW": window,
        **config,
    }
    # At run time the launcher sees that these are multiples of 16; known values stand in for that.
    fused = 2 * head_size
    for cache in ("key", "value"):
        constexprs |= {
            f"{cache}_block_stride": 8 * 16 * fused,
            f"{cache}_slot_stride": 8 * fused,
            f"{cache}_head_stride": fused,
            f"{cache}_dim_stride": 1,
        }
    for rows in ("query", "output"):
        constexprs |= {
            f"{rows}_token_stride": 8 * group_size * head_size,
            f"{rows}_head_stride": head_size,
        }
    if not fp8:
        constexprs |= {"key_scale_ptr": None, "value_scale_ptr": None}
    if not sinks:
        constexprs["sinks_ptr"] = None
    kind = TRITON_TYPE[dtype]
    signature = {
        name: "i32"
        for name in _tree_attention_kernel.arg_names
        if (name.endswith("_stride") or name in NUMBERS) and name not in constexprs
    }
    signature["query_ptr"] = f"*{kind}"
    cached = "fp8e4nv" if fp8 else kind
    signature |= dict.fromkeys(("key_cache_ptr", "value_cache_ptr"), f"*{cached}")
    if fp8:
        signature |= dict.fromkeys(("key_scale_ptr", "value_scale_ptr"), "*fp32")
    signature |= dict.fromkeys(
        ("query_start_loc_ptr", "seq_lens_ptr", "block_table_ptr", "visible_until_ptr"), "*i32"
    )
    signature |= {"tree_mask_ptr": "*i64", "qk_scale": "fp32", "softcap": "fp32"}
    if sinks:
        signature["sinks_ptr"] = f"*{kind}"
    signature |= {"output_ptr": f"*{kind}", "parts_ptr": "*fp32", "part_lse_ptr": "*fp32"}
    return signature, constexprs, options


SPILL_CASES = [
    *itertools.product(
        [90], (torch.bfloat16, torch.float32), (64, 80, 128, 192, 256), (1, 15), (False, True)
    ),
    *itertools.product([90], [torch.float16], (64, 128, 256), [15], [False]),
    *itertools.product((80, 100), [torch.bfloat16], (80, 128, 256), [15], (False, True)),
    *itertools.product((80, 100), [torch.float32], (128, 192), [15], [True]),
]


@pytest.mark.parametrize(
    ("capability", "dtype", "head_size", "max_query_len", "all_features"),
    with_rest(
        SPILL_CASES,
        always=[
            (90, torch.bfloat16, 128, 1, False),
            (90, torch.bfloat16, 128, 15, True),
            (80, torch.bfloat16, 128, 15, True),
            (100, torch.bfloat16, 128, 15, True),
        ],
    ),
)
def test_tree_attention(compile_for, capability, dtype, head_size, max_query_len, all_features):
    """At the configurations that a decode (one row block of 16) and a tree (the largest) get."""
    group_size = 1 if max_query_len == 1 else 4
    signature, constexprs, options = attention_job(
        dtype,
        head_size,
        group_size,
        max_query_len,
        softcap=all_features,
        window=all_features,
        sinks=all_features,
        capability=capability,
    )
    resources = compile_for(_tree_attention_kernel, signature, constexprs, capability, **options)
    what = f"attention, head {head_size}, {max_query_len} queries"
    print(f"{what}, {TRITON_TYPE[dtype]}, sm_{capability}: {resources}")
    # a few scalars may wait in memory while the keys pass by
    assert resources.spill_bytes <= 32
    assert not any(loop.spills for loop in resources.loops)


@pytest.mark.parametrize(
    ("capability", "max_query_len"),
    with_rest([(90, 15), (90, 512), (100, 15), (100, 512)], always=[(90, 15)]),
)
def test_tree_attention_over_an_fp8_cache(compile_for, capability, max_query_len):
    signature, constexprs, options = attention_job(
        torch.bfloat16, 128, 4, max_query_len, window=True, fp8=True
    )
    resources = compile_for(_tree_attention_kernel, signature, constexprs, capability, **options)
    what = f"attention, head 128, {max_query_len} queries"
    print(f"{what}, fp8, sm_{capability}: {resources}")
    assert resources.spill_bytes == 0


@pytest.mark.parametrize("capability", with_rest([(80,), (90,), (100,)], always=[(90,)]))
def test_merging_splits(compile_for, capability):
    constexprs = {"HEAD_SIZE": 80, "HEAD_PADDED": 128, "GROUP_SIZE": 4, "ROWS": MERGED_ROWS}
    constexprs |= {"BLOCK_Q": 16, "BLOCK_M": 64, "TILE": 64}
    signature = {name: "i32" for name in _merge_splits_kernel.arg_names if name not in constexprs}
    signature |= dict.fromkeys(("parts_ptr", "part_lse_ptr"), "*fp32")
    signature |= {"output_ptr": "*bf16", "query_start_loc_ptr": "*i32", "seq_lens_ptr": "*i32"}
    resources = compile_for(_merge_splits_kernel, signature, constexprs, capability)
    print(f"merge, head 80, bf16, sm_{capability}: {resources}")
    assert resources.spill_bytes == 0


@pytest.mark.parametrize(
    ("dtype", "capability"),
    with_rest([*itertools.product(ELEMENT_BITS, (80, 90, 100))], always=[(torch.int64, 90)]),
)
def test_compaction(compile_for, dtype, capability):
    constexprs = {
        "ELEMENT_BITS": ELEMENT_BITS[dtype],
        "ALIGNMENT": 16,
        "BLOCK_SIZE": 16,
        "NUM_HEADS": 8,
        "CONTENT": 256,
        "PATH_LEN": 6,
        "PATH_PADDED": 8,
        "HEADS_PADDED": 8,
        "CONTENT_PADDED": 256,
        "content_stride": 1,
    }
    signature = {name: "i32" for name in _compact_kernel.arg_names if name not in constexprs}
    signature |= {"view_address_ptr": "*i64", "root_positions_ptr": "*i64"}
    signature |= {"block_table_ptr": "*i32", "path_ptr": "*i32"}
    resources = compile_for(_compact_kernel, signature, constexprs, capability)
    print(f"compaction, {dtype}, sm_{capability}: {resources}")
    assert resources.spill_bytes == 0


@pytest.mark.parametrize("capability", with_rest([(80,), (90,), (100,)], always=[(90,)]))
@pytest.mark.parametrize("name", ["lay_out", "prepare_drafts"])
def test_step_inputs(compile_for, name, capability):
    kernel = getattr(step_inputs, f"_{name}_kernel")
    constexprs = {"BLOCK": step_inputs.BLOCK, "ROWS": 8}
    constexprs = {key: constexprs[key] for key in constexprs if key in kernel.arg_names}
    types = dict.fromkeys(("visible_until_ptr", "entries_ptr", "query_start_loc_ptr"), "*i32")
    types |= dict.fromkeys(("num_rejected_ptr", "paths_ptr"), "*i32")
    types |= dict.fromkeys(("row_temperature_ptr", "temperature_ptr"), "*fp32")
    signature = {
        argument: types.get(argument, "*i64" if argument.endswith("_ptr") else "i32")
        for argument in kernel.arg_names
        if argument not in constexprs
    }
    warps = 1 if name == "prepare_drafts" else 4
    resources = compile_for(kernel, signature, constexprs, capability, warps)
    print(f"{name}, int64, sm_{capability}: {resources}")
    assert resources.spill_bytes == 0


def test_host_versions_need_no_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from vllm_spechub.triton_kernels import child_sampling, verification\n"
        "from vllm_spechub.triton_kernels.child_sampling import reference\n"
        "from vllm_spechub.triton_kernels.verification import reference"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
