# SPDX-License-Identifier: Apache-2.0
"""KV compaction: the accepted path's keys and values of all layers move into consecutive slots.

Bytes: each entry that moves, read once and written once; none where the path is in place.
Error: the number of cache entries that differ from an indexed copy's.
Copy: that indexed copy, PyTorch's, layer by layer, with its indices at hand.
"""

from typing import Any

import torch

from kernel_benchmarks.measure import TREES, Case, Plot, grid
from kernel_benchmarks.sampling import DTYPES
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels.compaction import KVCompactor

BLOCK_SIZE = 16
CONTEXT = 40

SETTINGS = grid(
    layers=(32,),
    kv_heads=(8, 32),
    head_size=(64, 128, 256),
    dtype=("bf16",),
    nodes=(14, 62),
    accepted=("last leaf", "in place"),
    batch=(1, 4, 16, 64, 256),
)
QUICK = grid(
    layers=(4,),
    kv_heads=(8,),
    head_size=(64,),
    dtype=("fp32",),
    nodes=(14,),
    accepted=("last leaf", "in place"),
    batch=(1, 4),
)
PLOT = Plot("batch", "head_size", {"kv_heads": 8, "nodes": 14, "accepted": "last leaf"})


def prepare(setting: dict[str, Any], device: torch.device) -> Case:
    batch, num_heads = setting["batch"], setting["kv_heads"]
    dtype, head_size = DTYPES[setting["dtype"]], setting["head_size"]
    tree = TokenTree(TREES[setting["nodes"]])
    blocks_each = -(-(CONTEXT + 1 + tree.num_nodes) // BLOCK_SIZE)
    shape = (batch * blocks_each, num_heads, BLOCK_SIZE, 2 * head_size)
    caches = [torch.randn(shape, dtype=dtype, device=device) for _ in range(setting["layers"])]
    # each [num_blocks, block_size, num_kv_heads, 2 * head_size], as vLLM's attention has them
    views = [cache.transpose(1, 2) for cache in caches]
    block_table = torch.randperm(batch * blocks_each, dtype=torch.int32, device=device)
    block_table = block_table.view(batch, blocks_each)
    root_positions = torch.full((batch,), CONTEXT, device=device)
    nodes = tree.paths[-1] if setting["accepted"] == "last leaf" else (0, 1)
    path = torch.full((batch, tree.depth + 1), -1, dtype=torch.int32, device=device)
    path[:, : len(nodes)] = torch.tensor(nodes)
    compact = KVCompactor(views)

    requests = torch.arange(batch, device=device).unsqueeze(1)
    moved = [(node, depth) for depth, node in enumerate(nodes) if node != depth]
    # [num_moved] each
    source, target = (CONTEXT + torch.tensor(moved, device=device).view(-1, 2).T).long()
    source_block = block_table[requests, source // BLOCK_SIZE].long()
    target_block = block_table[requests, target // BLOCK_SIZE].long()

    def copy_each_layer(layers):
        for view in layers:
            view[target_block, target % BLOCK_SIZE] = view[source_block, source % BLOCK_SIZE]

    expected = [view.clone() for view in views]
    copy_each_layer(expected)
    compact(block_table, root_positions, path)
    wrong = sum(int((a != b).sum()) for a, b in zip(views, expected, strict=True))
    entry = len(views) * num_heads * 2 * head_size * dtype.itemsize
    return Case(
        run=lambda: compact(block_table, root_positions, path),
        num_bytes=2 * batch * len(moved) * entry,
        error=wrong,
        tolerance=0,
        others={"copy": lambda: copy_each_layer(views)},
        found={"launches": len(compact.launches) or None},
    )
