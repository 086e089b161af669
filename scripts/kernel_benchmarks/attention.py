# SPDX-License-Identifier: Apache-2.0
"""Tree attention: the root's and all nodes' queries over a paged cache.

Bytes: each request's keys and values once, queries and outputs once.
Error: the largest difference of an output from the reference's, over the first two requests.
vLLM: its unified attention in Triton, on the CPU its C++ attention, for as many query rows, masked
causally. FlashAttention 3: the same as a chain, where vLLM has it.
"""

import math
from typing import Any

import numpy as np
import torch

from kernel_benchmarks.measure import TREES, Case, Plot, grid
from kernel_benchmarks.sampling import DTYPES
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels.tree_attention import tree_attention, tree_attention_reference

CHECKED = 2
TOLERANCE = {"bf16": 4e-3, "fp32": 1e-5}

SETTINGS = grid(
    nodes=(7, 14, 30, 62),
    q_heads=(32,),
    kv_heads=(8, 32),
    head_size=(64, 80, 128, 256),
    dtype=("bf16",),
    context=(512, 2048, 8192, 32768),
    batch=(1, 4, 16, 64, 256),
)
QUICK = grid(
    nodes=(14,),
    q_heads=(8,),
    kv_heads=(2, 8),
    head_size=(64, 128),
    dtype=("fp32",),
    context=(512,),
    batch=(1, 4),
)
PLOT = Plot("context", "batch", {"nodes": 14, "kv_heads": 8, "head_size": 128})


def prepare(setting: dict[str, Any], device: torch.device) -> Case:
    step = Step(setting, device)
    run, others = (on_gpu if device.type == "cuda" else on_cpu)(step)
    output = step.output
    output.fill_(math.nan)
    run()
    rows = slice(0, min(CHECKED, step.batch) * step.width)
    expected = torch.empty_like(output)
    tree_attention_reference(
        *(step.query[rows], *step.views, expected[rows], step.query_start_loc[: CHECKED + 1]),
        *(step.seq_lens[:CHECKED], step.block_table, step.visible_until, step.tree_mask),
        *(step.scale, step.width),
    )
    return Case(
        run=run,
        num_bytes=2 * step.query.nbytes
        + 2
        * step.batch
        * step.seq_len
        * setting["kv_heads"]
        * setting["head_size"]
        * step.query.itemsize,
        error=float((output[rows] - expected[rows]).abs().max()),
        tolerance=TOLERANCE[setting["dtype"]],
        others=others,
    )


class Step:
    """One decode step of one layer, as the target's attention meets it."""

    def __init__(self, setting: dict[str, Any], device: torch.device) -> None:
        tree = TokenTree(TREES[setting["nodes"]])
        dtype, head_size = DTYPES[setting["dtype"]], setting["head_size"]
        block_size = 16 if device.type == "cuda" else 32
        self.batch, self.width = setting["batch"], 1 + tree.num_nodes
        self.seq_len = setting["context"] + self.width
        self.scale = head_size**-0.5
        num_tokens = self.batch * self.width
        num_blocks = self.batch * -(-self.seq_len // block_size)
        self.query = torch.randn(
            num_tokens, setting["q_heads"], head_size, dtype=dtype, device=device
        )
        self.output = torch.empty_like(self.query)
        shape = (num_blocks, setting["kv_heads"], block_size, 2 * head_size)
        self.cache = torch.randn(shape, dtype=dtype, device=device)
        self.block_table = torch.randperm(num_blocks, dtype=torch.int32, device=device)
        self.block_table = self.block_table.view(self.batch, -1)
        starts = torch.arange(self.batch + 1, dtype=torch.int32, device=device)
        self.query_start_loc = starts * self.width
        self.seq_lens = torch.full_like(starts[1:], self.seq_len)
        self.visible_until = torch.full_like(self.query_start_loc, setting["context"])
        self.visible_until = self.visible_until[:1].repeat(num_tokens)
        self.tree_mask = torch.from_numpy(tree.ancestor_masks).to(device).repeat(self.batch)

    @property
    def views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the keys and values, [num_blocks, block_size, num_kv_heads, head_size] each."""
        if self.cache.is_cuda:
            from vllm_spechub.attention.triton_backend import cache_views
        else:
            from vllm_spechub.attention.cpu_backend import cache_views
        return cache_views(self.cache)


def on_gpu(step: Step):
    from vllm.v1.attention.backends.fa_utils import is_fa_version_supported
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    keys, values = step.views
    unread = torch.empty_like(step.output)
    one = torch.ones(step.batch, keys.shape[2], device=keys.device)
    # vLLM's kernels get a chain of as many tokens.
    chain = {
        "q": step.query,
        "k": keys,
        "v": values,
        "out": unread,
        "cu_seqlens_q": step.query_start_loc,
        "max_seqlen_q": step.width,
        "seqused_k": step.seq_lens,
        "max_seqlen_k": step.seq_len,
        "softmax_scale": step.scale,
        "causal": True,
        "block_table": step.block_table,
    }

    def tree():
        tree_attention(
            *(step.query, keys, values, step.output, step.query_start_loc, step.seq_lens),
            *(step.block_table, step.visible_until, step.tree_mask, step.scale, step.width),
        )

    def unified():
        unified_attention(
            **chain,
            window_size=(-1, -1),
            softcap=0,
            q_descale=None,
            k_descale=one,
            v_descale=one,
        )

    def flash():
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        flash_attn_varlen_func(**chain, fa_version=3)

    return tree, {"vllm": unified, "flash3": flash if is_fa_version_supported(3) else None}


def on_cpu(step: Step):
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    from vllm_spechub.attention.cpu_backend import host_views
    from vllm_spechub.cpu.tree_kernels.attention import attend_trees

    num_blocks, num_kv_heads, block_size, _ = step.cache.shape
    num_heads, head_size = step.query.shape[1:]
    where = [
        step.block_table,
        step.seq_lens,
        step.query_start_loc[:-1].long(),
        torch.full((step.batch,), step.width),
        step.visible_until,
        step.tree_mask,
    ]
    arrays = [step.query.numpy(), *host_views(step.cache, head_size)]
    arrays += [tensor.numpy() for tensor in where]
    # scale, softcap, window and sinks
    rest = (np.float32(step.scale), np.float32(0), 0, np.full(num_heads, -np.inf, np.float32))

    def tree():
        attend_trees(*arrays, *rest, step.output.numpy())

    keys, values = step.cache.view(num_blocks, num_kv_heads, -1, head_size).chunk(2, dim=2)
    isa = _get_attn_isa(step.query.dtype, block_size, head_size)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        *(step.batch, num_heads, num_kv_heads, head_size, step.seq_lens, step.query.dtype),
        *(step.query_start_loc, True, -1, isa, True),
    )
    unread = torch.empty_like(step.output)

    def causal():
        ops.cpu_attention_with_kv_cache(
            *(step.query, keys, values, unread, step.query_start_loc, step.seq_lens, step.scale),
            *(True, None, -1, step.block_table, 0.0, metadata, None),
        )

    return tree, {"vllm": causal, "flash3": None}
