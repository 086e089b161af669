# SPDX-License-Identifier: Apache-2.0
"""The CPU's compiled compaction, against the reference."""

import pytest
import torch

from vllm_spechub.attention.cpu_backend import cache_views
from vllm_spechub.cpu.tree_kernels.compaction import HostKVCompactor
from vllm_spechub.triton_kernels.compaction import KVCompactor, compact_reference
from vllm_spechub.triton_kernels.compaction.reference import as_raw_bits

# node ids by depth, -1 past the end
PATHS = [
    [0, 2, 5, 12, -1],  # every depth moves
    [0, 1, 2, 3, 4],  # in place
    [0, 1, 4, -1, -1],  # only the last
    [0, 2, 3, 4, 9],  # each target is the source of the depth before
    [0, -1, -1, -1, -1],  # nothing accepted
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_moves_the_path_as_the_reference_does(dtype):
    """Over layers of vLLM's layout, whose keys are transposed, and over block boundaries."""
    torch.manual_seed(0)
    block_size, num_reqs = 32, len(PATHS)
    raw = torch.randint(0, 256, (2, 12, 2, block_size, 64 * dtype.itemsize), dtype=torch.uint8)
    caches = [layer.view(dtype) for layer in raw]
    expected, untouched = ([cache.clone() for cache in caches] for _ in range(2))
    table = torch.randperm(12)[: 2 * num_reqs].view(num_reqs, 2).int()
    roots = torch.tensor([3, 29, 30, 28, 31])
    path = torch.tensor(PATHS, dtype=torch.int32)

    HostKVCompactor([view for cache in caches for view in cache_views(cache)])(table, roots, path)
    views = [as_raw_bits(view) for cache in expected for view in cache_views(cache)]
    compact_reference(views, table, roots, path)

    for cache, want, before in zip(caches, expected, untouched, strict=True):
        assert torch.equal(as_raw_bits(cache), as_raw_bits(want))
        assert not torch.equal(as_raw_bits(cache), as_raw_bits(before))


@pytest.mark.parametrize("compactor", [HostKVCompactor, KVCompactor])
def test_a_cache_that_layers_share_moves_once(compactor):
    torch.manual_seed(0)
    caches = [torch.randn(4, 2, 16, 8) for _ in range(2)]
    path = torch.tensor([[0, 2, 5, 12]], dtype=torch.int32)
    places = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([3]), path
    expected = [cache.clone() for cache in caches]
    for depth, node in enumerate(path[0].tolist()):
        for moved, cache in zip(expected, caches, strict=True):
            moved[1, :, 3 + depth] = cache[1, :, 3 + node]

    layers = [caches[0], caches[1], caches[0], caches[1], caches[1]]
    compact = compactor([cache.transpose(1, 2) for cache in layers])
    assert len(compact.kv_views) == 2
    compact(*places)
    assert torch.equal(torch.stack(caches), torch.stack(expected))
