# SPDX-License-Identifier: Apache-2.0
"""KV compaction: kernel and reference against a per-entry oracle, resources."""

import pytest
import torch

from helpers.devices import DEVICE
from vllm_spechub.triton_kernels.compaction import KVCompactor
from vllm_spechub.triton_kernels.compaction.kernel import (
    plan_launches,
)
from vllm_spechub.triton_kernels.compaction.reference import as_raw_bits

NUM_BLOCKS = 11

# Node ids by depth; -1 past the end.
PATHS = [
    [0, 2, 5, 12, -1],  # every depth moves
    [0, 1, 2, 3, 4],  # in place
    [0, 1, 4, -1, -1],  # only the last
    [0, 2, 3, 4, 9],  # each target is the previous depth's source
    [0, -1, -1, -1, -1],  # nothing accepted
    [0, 2, 3, 8, 17],  # crosses a block of 16 from any root
]


def make_view(layout: str, heads: int, content: int, block_size: int, dtype) -> torch.Tensor:
    """A view [NUM_BLOCKS, block_size, heads, content] with random bytes behind it."""
    shapes = {
        "NHD": (NUM_BLOCKS, block_size, heads, content),
        "HND": (NUM_BLOCKS, heads, block_size, content),
        "transposed": (NUM_BLOCKS, heads, content, block_size),
    }
    orders = {"NHD": (0, 1, 2, 3), "HND": (0, 2, 1, 3), "transposed": (0, 3, 1, 2)}
    itemsize = dtype.itemsize
    *outer, last = shapes[layout]
    raw = torch.randint(0, 256, (*outer, last * itemsize), dtype=torch.uint8)
    return raw.to(DEVICE).view(dtype).permute(orders[layout])


def make_call(paths: list[list[int]], block_size: int, first_root: int = 13):
    """Block table, root positions and paths; every request has its own blocks."""
    num_reqs = len(paths)
    per_req = -(-(first_root + num_reqs + 64) // block_size)
    table = torch.stack([torch.randperm(NUM_BLOCKS)[:per_req] for _ in range(num_reqs)])
    roots = torch.arange(first_root, first_root + num_reqs)
    path = torch.tensor(paths, dtype=torch.int32)
    return table.int().to(DEVICE), roots.to(DEVICE), path.to(DEVICE)


def oracle(views, block_table, roots, path) -> list[torch.Tensor]:
    """Entry by entry, in depth order, on copies."""
    results = [view.clone() for view in views]
    for view, result in zip(views, results, strict=True):
        block_size = view.shape[1]
        for req, nodes in enumerate(path.tolist()):
            for depth, node in enumerate(nodes):
                if node >= 0:
                    source, target = int(roots[req]) + node, int(roots[req]) + depth
                    entry = view[block_table[req, source // block_size], source % block_size]
                    slot = block_table[req, target // block_size], target % block_size
                    result[slot] = entry
    return results


def run_kernel(views, block_table, roots, path) -> None:
    for launch in plan_launches([as_raw_bits(view) for view in views]):
        launch(block_table, roots, path)


def run_public(views, block_table, roots, path) -> None:
    KVCompactor(views)(block_table, roots, path)


@pytest.mark.parametrize("compact", [run_kernel, run_public])
@pytest.mark.parametrize(
    ("layout", "heads", "content", "block_size", "dtype"),
    [
        ("NHD", 2, 128, 16, torch.bfloat16),
        ("HND", 3, 160, 32, torch.float16),
        ("HND", 1, 63, 128, torch.float32),
        ("transposed", 2, 80, 32, torch.float32),
        ("NHD", 5, 72, 48, torch.uint8),
        ("HND", 2, 64, 16, torch.float8_e4m3fn),
    ],
)
def test_moves_the_path(compact, layout, heads, content, block_size, dtype):
    torch.manual_seed(content)
    for path in PATHS:
        views = [make_view(layout, heads, content, block_size, dtype) for _ in range(3)]
        # One request at a time: requests never share a block that moves.
        call = make_call([path], block_size)
        expected = oracle([as_raw_bits(view) for view in views], *call)
        compact(views, *call)
        for view, want in zip(views, expected, strict=True):
            assert torch.equal(as_raw_bits(view), want), path


@pytest.mark.parametrize("compact", [run_kernel, run_public])
def test_requests_and_layouts_together(compact):
    """Several requests over layers of three layouts; two views are halves of one tensor."""
    torch.manual_seed(1)
    fused = make_view("HND", 2, 128, 16, torch.bfloat16)
    apart = make_view("NHD", 2, 64, 16, torch.bfloat16)  # as the halves, but for its strides
    transposed = make_view("transposed", 4, 64, 16, torch.float32)
    views = [fused[..., :64], fused[..., 64:], apart, transposed]
    table = torch.tensor([[4, 1, 9], [3, 0, 7], [10, 2, 5]], dtype=torch.int32)
    roots = torch.tensor([0, 14, 21])
    path = torch.tensor([[0, 2, 6, 14, 29], [0, 1, 3, -1, -1], [0, 2, 3, 4, 9]]).int()
    expected = oracle([as_raw_bits(view) for view in views], table, roots, path)
    assert len(plan_launches([as_raw_bits(view) for view in views])) == 3
    compact(views, table.to(DEVICE), roots.to(DEVICE), path.to(DEVICE))
    for view, want in zip(views, expected, strict=True):
        assert torch.equal(as_raw_bits(view), want)


def test_alike_layers_are_one_launch():
    """Keys and values of all layers, wherever each layer's memory is."""
    layers = [make_view("HND", 2, 128, 16, torch.bfloat16) for _ in range(5)]
    views = [half for layer in layers for half in layer.chunk(2, dim=-1)]
    call = make_call([[0, 2, 5, 12]], 16)
    expected = oracle([as_raw_bits(view) for view in views], *call)
    (launch,) = plan_launches([as_raw_bits(view) for view in views])
    launch(*call)
    for view, want in zip(views, expected, strict=True):
        assert torch.equal(as_raw_bits(view), want)


def test_longest_path():
    """Depth 62 of 63 drafts: 62 moves, each onto the previous one's source."""
    torch.manual_seed(2)
    view = make_view("NHD", 2, 16, 16, torch.float32)
    path = [0, *range(2, 64)]
    call = make_call([path], 16, first_root=30)
    expected = oracle([as_raw_bits(view)], *call)[0]
    run_kernel([view], *call)
    assert torch.equal(as_raw_bits(view), expected)


@pytest.mark.parametrize("path", [[0, 1, 2, 3], [0, 1, -1, -1], [0, -1, -1, -1], [-1] * 4])
@pytest.mark.parametrize("compact", [run_kernel, run_public])
def test_nothing_to_move_touches_nothing(compact, path):
    """Neither the cache nor the block table is read: both lead nowhere here."""
    view = make_view("NHD", 2, 16, 16, torch.float32)
    before = view.clone()
    table = torch.full((1, 4), 1 << 30, dtype=torch.int32, device=DEVICE)
    version = view._version
    path = torch.tensor([path], dtype=torch.int32, device=DEVICE)
    compact([view], table, torch.tensor([7], device=DEVICE), path)
    assert view._version == version
    assert torch.equal(as_raw_bits(view), as_raw_bits(before))


def test_empty_batch():
    view = make_view("NHD", 2, 16, 16, torch.float32)
    empty = torch.zeros(0, 4, dtype=torch.int32, device=DEVICE)
    for compact in (run_kernel, run_public):
        compact([view], empty, torch.zeros(0, dtype=torch.int64, device=DEVICE), empty)


def test_bad_arguments_are_named():
    view = make_view("NHD", 2, 16, 16, torch.float32)
    with pytest.raises(ValueError, match=r"^kv_views:"):
        KVCompactor([])
    with pytest.raises(ValueError, match=r"^kv_views:"):
        KVCompactor([view[0]])
    with pytest.raises(ValueError, match=r"^kv_views:"):
        KVCompactor([view, view[:, :8]])
    table, roots, path = make_call(PATHS[:2], 16)
    compact = KVCompactor([view])
    with pytest.raises(ValueError, match=r"^block_table:"):
        compact(table.long(), roots, path)
    with pytest.raises(ValueError, match=r"^root_positions:"):
        compact(table, roots.int(), path)
    with pytest.raises(ValueError, match=r"^path:"):
        compact(table, roots, path.long())
