# SPDX-License-Identifier: Apache-2.0
"""Tree attention: kernel against reference, reference against its definition, resources."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from helpers.devices import DEVICE
from vllm_spechub.triton_kernels.tree_attention import (
    CAUSAL,
    kernel,
    tree_attention,
    tree_attention_reference,
)
from vllm_spechub.triton_kernels.tree_attention.kernel import tree_attention_triton

WHOLE = 1 << 20
"""Tiles that no request has, so that none is split."""
RATIO = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture
def interpreted_bf16_dot(monkeypatch):
    """Triton 3.6's interpreter keeps bf16 as uint16 and multiplies the bit patterns."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: create_dot(self, widen(a), widen(b), *rest),
    )


def signed(mask: int) -> int:
    """A 64-bit mask as the int64 that holds it."""
    return mask - (1 << 64) if mask >> 63 else mask


def tree_rows(root: int, parents: list[int]) -> list[tuple[int, int]]:
    """(visible_until, tree_mask) per node of a tree given by the parents of nodes 1, 2, ..."""
    masks = [1]
    for node, parent in enumerate(parents, start=1):
        masks.append(masks[parent] | 1 << node)
    return [(root, signed(mask)) for mask in masks]


def binary_parents(num_drafts: int) -> list[int]:
    return [(node - 1) // 2 for node in range(1, num_drafts + 1)]


def causal_rows(seq_len: int, query_len: int) -> list[tuple[int, int]]:
    return [(position + 1, 0) for position in range(seq_len - query_len, seq_len)]


@dataclass
class Batch:
    """The tensors of one attention call."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    visible_until: torch.Tensor
    tree_mask: torch.Tensor

    def run(self, attend, **options) -> torch.Tensor:
        output = torch.full_like(self.query, 7.0)
        attend(
            self.query,
            self.key_cache,
            self.value_cache,
            output,
            self.query_start_loc,
            self.seq_lens,
            self.block_table,
            self.visible_until,
            self.tree_mask,
            scale=self.query.shape[-1] ** -0.5,
            max_query_len=int(self.query_start_loc.diff().max()),
            **options,
        )
        return output


def make_batch(
    requests: list[tuple[int, list[tuple[int, int]]]],
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    head_size: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    padding: int = 3,
    layout: str = "NHD",
) -> Batch:
    """A batch of (seq_len, rows) requests; blocks in random order, every unused slot NaN."""
    generator = torch.Generator().manual_seed(len(requests) * 1000 + head_size)
    num_reqs = len(requests)
    blocks_per_req = [-(-seq_len // block_size) for seq_len, _ in requests]
    num_blocks = sum(blocks_per_req) + 2
    order = torch.randperm(num_blocks, generator=generator)
    block_table = torch.zeros(num_reqs, max(blocks_per_req) + 1, dtype=torch.int32)
    # As in vLLM: one allocation, keys and values side by side in the last dimension.
    nan = float("nan")
    if layout == "NHD":
        fused = torch.full((num_blocks, block_size, num_kv_heads, 2 * head_size), nan)
    else:
        fused = torch.full((num_blocks, num_kv_heads, block_size, 2 * head_size), nan)
        fused = fused.transpose(1, 2)
    fused = fused.to(dtype)
    next_block = 0
    for req, (seq_len, _) in enumerate(requests):
        blocks = order[next_block : next_block + blocks_per_req[req]]
        next_block += blocks_per_req[req]
        block_table[req, : len(blocks)] = blocks
        for position in range(seq_len):
            entry = torch.randn(num_kv_heads, 2 * head_size, generator=generator)
            fused[blocks[position // block_size], position % block_size] = entry.to(dtype)
    rows = [row for _, request_rows in requests for row in request_rows]
    num_tokens = len(rows) + padding
    query = torch.randn(num_tokens, num_q_heads, head_size, generator=generator)
    starts = torch.tensor([0] + [len(request_rows) for _, request_rows in requests])
    fused = fused.to(DEVICE)
    return Batch(
        query=query.to(DEVICE, dtype),
        key_cache=fused[..., :head_size],
        value_cache=fused[..., head_size:],
        query_start_loc=starts.cumsum(0).int().to(DEVICE),
        seq_lens=torch.tensor([seq_len for seq_len, _ in requests]).int().to(DEVICE),
        block_table=block_table.to(DEVICE),
        visible_until=torch.tensor([until for until, _ in rows] + [113] * padding).int().to(DEVICE),
        tree_mask=torch.tensor([mask for _, mask in rows] + [113] * padding).to(DEVICE),
    )


def mixed_requests() -> list[tuple[int, list[tuple[int, int]]]]:
    """Full tree, truncated tree, prefill, no tokens, decode, prefill ending in a tree."""
    return [
        (30 + 15, tree_rows(30, binary_parents(14))),
        (17 + 6, tree_rows(17, binary_parents(5))),
        (21, causal_rows(21, 21)),
        (9, []),
        (40, causal_rows(40, 1)),
        (19 + 1, tree_rows(19, [])),
        (38, causal_rows(31, 5) + tree_rows(31, binary_parents(6))),
    ]


def assert_close(reference: torch.Tensor, candidate: torch.Tensor) -> None:
    """RMS error relative to the reference's RMS, by dtype."""
    error = (reference.float() - candidate.float()).square().mean().sqrt()
    ratio = (error / reference.float().square().mean().sqrt()).item()
    # `<` is false for NaN.
    assert ratio < RATIO[reference.dtype], f"error ratio {ratio:.2e}"


def naive(batch: Batch, row: int, head: int, window: int = 10**6, sinks=None) -> torch.Tensor:
    """One output row from the definition, key by key."""
    req = int((batch.query_start_loc <= row).sum()) - 1
    block_size, num_kv_heads, head_size = batch.key_cache.shape[1:]
    kv_head = head * num_kv_heads // batch.query.shape[1]
    until, mask = int(batch.visible_until[row]), int(batch.tree_mask[row]) % (1 << 64)
    ancestors = [bit for bit in range(64) if mask >> bit & 1]
    position = until - 1 + len(ancestors)
    scores, values = [], []
    for s in range(int(batch.seq_lens[req])):
        if s < until or s - until in ancestors:
            depth_position = s if s < until else until + ancestors.index(s - until)
            if position - depth_position >= window:
                continue
            slot = batch.block_table[req, s // block_size], s % block_size, kv_head
            scores.append(batch.query[row, head] @ batch.key_cache[slot] * head_size**-0.5)
            values.append(batch.value_cache[slot])
    if sinks is not None:
        scores.append(sinks[head].float())
        values.append(torch.zeros_like(values[0]))
    return torch.softmax(torch.stack(scores), 0) @ torch.stack(values)


def test_reference_follows_the_definition():
    batch = make_batch(mixed_requests())
    output = batch.run(tree_attention_reference)
    for row in range(int(batch.query_start_loc[-1])):
        torch.testing.assert_close(output[row, row % 4], naive(batch, row, row % 4))
    assert (output[batch.query_start_loc[-1] :] == 7.0).all()


@pytest.mark.parametrize(
    ("num_q_heads", "num_kv_heads", "head_size", "block_size", "layout"),
    [
        (4, 2, 64, 16, "NHD"),
        (3, 3, 80, 32, "HND"),  # MHA, padded head
        (7, 1, 128, 128, "NHD"),  # a group that is no power of two; one block per request
        (8, 2, 96, 48, "HND"),  # a block size that is none either
    ],
)
@pytest.mark.parametrize("min_tiles", [WHOLE, 1])
def test_mixed_batch(num_q_heads, num_kv_heads, head_size, block_size, layout, min_tiles):
    batch = make_batch(
        mixed_requests(), num_q_heads, num_kv_heads, head_size, block_size, layout=layout
    )
    output = batch.run(tree_attention_triton, min_tiles=min_tiles)
    reference = batch.run(tree_attention_reference)
    used = int(batch.query_start_loc[-1])
    assert_close(reference[:used], output[:used])
    assert (output[used:] == 7.0).all(), "padding rows were written"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("min_tiles", [WHOLE, 2])
@pytest.mark.usefixtures("interpreted_bf16_dot")
def test_half_precision(dtype, min_tiles):
    batch = make_batch(mixed_requests(), dtype=dtype, padding=0)
    output = batch.run(tree_attention_triton, min_tiles=min_tiles)
    assert_close(batch.run(tree_attention_reference), output)


@pytest.mark.parametrize("root", [0, 15, 70])
def test_64_nodes(root):
    """A chain and a star of 64 nodes: the last node uses the sign bit."""
    chain = tree_rows(root, list(range(63)))
    star = tree_rows(root, [0] * 63)
    assert chain[-1][1] == -1
    assert star[-1][1] < 0
    batch = make_batch([(root + 64, chain), (root + 64, star)], padding=0)
    output = batch.run(tree_attention_triton, min_tiles=WHOLE)
    assert_close(batch.run(tree_attention_reference), output)


def test_rows_need_not_share_a_root():
    """Bit 0 does not come round again at node 64, nor does a stale row reach past `seq_len`."""
    last_bit = signed(1 << 63)
    requests = [
        (100, [(0, 1), (20, 1), (1000, -1), (100, 0), (10, last_bit)]),
        (30, [(0, 1), (20, 1)]),
    ]
    batch = make_batch(requests, padding=0)
    output = batch.run(tree_attention_triton, min_tiles=WHOLE)
    assert_close(batch.run(tree_attention_reference), output)
    for row in range(7):
        torch.testing.assert_close(output[row, 1], naive(batch, row, 1))


def test_chain_is_causal():
    """A chain-shaped tree, explicit causal rows and the CAUSAL sentinel agree bit for bit."""
    seq_len, query_len = 41, 9
    root = seq_len - query_len
    variants = [
        tree_rows(root, list(range(query_len - 1))),
        causal_rows(seq_len, query_len),
        [(CAUSAL, -1)] * query_len,  # the mask is ignored
    ]
    outputs = [make_batch([(seq_len, rows)], padding=0) for rows in variants]
    for attend in (tree_attention_reference, tree_attention_triton):
        chain, causal, sentinel = (batch.run(attend) for batch in outputs)
        assert torch.equal(chain, causal)
        assert torch.equal(sentinel, causal)


def test_siblings_are_invisible():
    """Changing one leaf's key and value changes that leaf's row and no other."""
    batch = make_batch([(20 + 7, tree_rows(20, binary_parents(6)))], padding=0)
    before = batch.run(tree_attention_triton)
    slot = batch.block_table[0, 26 // 16], 26 % 16
    batch.key_cache[slot] += 1.0
    batch.value_cache[slot] += 1.0
    changed = (batch.run(tree_attention_triton) != before).flatten(1).any(1)
    assert changed.tolist() == [False] * 6 + [True]


@pytest.mark.parametrize(
    "attend", [tree_attention_reference, partial(tree_attention_triton, min_tiles=WHOLE)]
)
def test_slots_that_nobody_sees_may_hold_nan(attend):
    """A draft pass feeds inner nodes only: here node 1 is a leaf whose slot was never written."""
    rows = [(20, 0b1), (20, 0b101), (20, 0b1101)]
    batch = make_batch([(20 + 4, rows)], padding=0)
    expected = batch.run(attend)
    slot = batch.block_table[0, 21 // 16], 21 % 16
    batch.key_cache[slot] = float("nan")
    batch.value_cache[slot] = float("nan")
    assert torch.equal(batch.run(attend), expected)


@pytest.mark.parametrize("min_tiles", [WHOLE, 1])
def test_row_that_sees_nothing_is_zero(min_tiles):
    batch = make_batch([(5, [(0, 0), (0, 1)])], padding=0)
    output = batch.run(tree_attention_triton, min_tiles=min_tiles)
    assert (output[0] == 0).all()
    assert_close(batch.run(tree_attention_reference), output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.usefixtures("interpreted_bf16_dot")
def test_fp8_cache(dtype, fp8):
    """Stored with scales, read with them; unused slots are NaN there as well."""
    batch = make_batch(mixed_requests(), dtype=dtype, padding=0)
    scales = torch.tensor([[0.5], [2.0]], device=DEVICE)
    exact = make_batch(mixed_requests(), dtype=dtype, padding=0)
    for name, scale in zip(("key_cache", "value_cache"), scales, strict=True):
        stored = (getattr(batch, name).float() / scale).to(fp8)
        setattr(batch, name, stored)
        setattr(exact, name, (stored.float() * scale).to(dtype))
    options = {"key_scale": scales[0], "value_scale": scales[1], "window": 20}
    expected = exact.run(tree_attention_reference, window=20)
    assert_close(expected, batch.run(tree_attention_reference, **options))
    for min_tiles in (WHOLE, 2):
        assert_close(expected, batch.run(tree_attention_triton, min_tiles=min_tiles, **options))


def test_softcap():
    batch = make_batch(mixed_requests(), padding=0)
    batch.query *= 20.0
    reference = batch.run(tree_attention_reference, softcap=2.0)
    assert_close(reference, batch.run(tree_attention_triton, softcap=2.0, min_tiles=WHOLE))
    assert not torch.allclose(reference, batch.run(tree_attention_reference), atol=1e-2)


def long_requests() -> list[tuple[int, list[tuple[int, int]]]]:
    """Trees and causal rows, some of whose windows begin in the middle of a block."""
    return [
        (75 + 15, tree_rows(75, binary_parents(14))),
        (40 + 6, tree_rows(40, [0, 1, 2, 3, 4])),
        (3 + 5, tree_rows(3, binary_parents(4))),
        (70, causal_rows(70, 70)),
        (90, [(CAUSAL, 0)]),
        (60, causal_rows(53, 5) + tree_rows(53, binary_parents(6))),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("interpreted_bf16_dot")
def test_sinks(dtype):
    """One more logit in each head's sum, counted once however the keys are split; neither scaled
    nor capped. A large one leaves little, an infinitely small one all."""
    sinks = torch.tensor([0.5, 9.0, -3.0, -torch.inf], device=DEVICE, dtype=dtype)
    batch = make_batch(long_requests(), dtype=dtype)
    used = int(batch.query_start_loc[-1])
    for options in ({}, {"window": 20}, {"softcap": 2.0}):
        reference = batch.run(tree_attention_reference, sinks=sinks, **options)
        for min_tiles in (WHOLE, 1):
            output = batch.run(tree_attention_triton, sinks=sinks, min_tiles=min_tiles, **options)
            assert_close(reference[:used], output[:used])
            for head in range(4):
                assert_close(reference[:used, head], output[:used, head])
    if dtype == torch.float32:
        reference = batch.run(tree_attention_reference, sinks=sinks)
        batch.visible_until[used - 13] = 90  # the one sentinel, as `naive` needs it
        for row in range(0, used, 3):
            for head in range(4):
                expected = naive(batch, row, head, sinks=sinks)
                torch.testing.assert_close(reference[row, head], expected)


@pytest.mark.parametrize("min_tiles", [WHOLE, 1])
def test_only_the_sink_is_seen(min_tiles):
    batch = make_batch([(5, [(0, 0), (0, 1)])], padding=0)
    sinks = torch.full((4,), -2.0, device=DEVICE)
    output = batch.run(tree_attention_triton, min_tiles=min_tiles, sinks=sinks)
    assert (output[0] == 0).all()
    assert_close(batch.run(tree_attention_reference, sinks=sinks), output)


@pytest.mark.parametrize("window", [1, 2, 3, 16, 33, 500])
def test_window_counts_depths(window):
    batch = make_batch(long_requests())
    reference = batch.run(tree_attention_reference, window=window)
    used = int(batch.query_start_loc[-1])
    for min_tiles in (WHOLE, 1):
        output = batch.run(tree_attention_triton, min_tiles=min_tiles, window=window)
        assert_close(reference[:used], output[:used])
        assert (output[used:] == 7.0).all()
    batch.visible_until[used - 13] = 90  # the one sentinel, as `naive` needs it
    for row in range(used):
        torch.testing.assert_close(reference[row, 1], naive(batch, row, 1, window))


def test_window_reaches_over_all_64_nodes():
    chain, star = tree_rows(20, list(range(63))), tree_rows(20, [0] * 63)
    batch = make_batch([(84, chain), (84, star)], padding=0)
    for window in (2, 40, 63, 64, 70):
        output = batch.run(tree_attention_triton, min_tiles=WHOLE, window=window)
        assert_close(batch.run(tree_attention_reference, window=window), output)


@pytest.mark.parametrize(
    "attend", [tree_attention_triton, partial(tree_attention_triton, min_tiles=1)]
)
def test_blocks_before_every_window_are_not_read(attend):
    """vLLM frees them, and their place in the table points at a block that holds anything."""
    requests = [(90 + 7, tree_rows(90, binary_parents(6))), (90, causal_rows(90, 3))]
    batch = make_batch(requests, padding=0)
    expected = batch.run(attend, window=20)
    assert expected.isfinite().all()
    for req, first in ((0, 90), (1, 87)):
        for block in range((first - 19) // 16):
            batch.key_cache[batch.block_table[req, block]] = float("nan")
            batch.value_cache[batch.block_table[req, block]] = float("nan")
    assert torch.equal(batch.run(attend, window=20), expected)


def test_any_split_fits_the_launch():
    """A graph captured for one split of the tokens replays another: `max_query_len` only tunes."""
    batch = make_batch(mixed_requests())
    used = int(batch.query_start_loc[-1])
    reference = batch.run(tree_attention_reference)[:used]
    for max_query_len in (1, 500):

        def attend(*args, **kwargs):
            kwargs["max_query_len"] = max_query_len  # noqa: B023
            tree_attention_triton(*args, **kwargs, min_tiles=WHOLE)

        assert_close(reference, batch.run(attend)[:used])


def test_no_key_is_read_past_the_visible_ones():
    """Early prefill rows must not load the later keys, which are NaN here."""
    batch = make_batch([(300, causal_rows(300, 300))], 1, 1, padding=0)
    late = batch.block_table[0, 256 // 16 : 300 // 16 + 1].long()
    batch.key_cache[late] = float("nan")
    batch.value_cache[late] = float("nan")
    output = batch.run(tree_attention_triton, min_tiles=WHOLE)
    assert output[:256].isfinite().all()
    assert output[256:].isnan().all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("query", {"query": torch.zeros(4, 4, 64, dtype=torch.float64)}),
        ("key_cache", {"key_cache": torch.zeros(4, 8, 2, 64)}),
        ("value_cache", {"value_cache": torch.zeros(4, 16, 2, 32)}),
        ("query_start_loc", {"query_start_loc": torch.zeros(2)}),
        ("seq_lens", {"seq_lens": torch.zeros(1)}),
        ("block_table", {"block_table": torch.zeros(1, 2, dtype=torch.int64)}),
        ("visible_until", {"visible_until": torch.zeros(1, dtype=torch.int32)}),
        ("tree_mask", {"tree_mask": torch.zeros(4, dtype=torch.int32)}),
        ("key_scale", {"key_cache": torch.zeros(4, 16, 2, 64).to(torch.float8_e4m3fn)}),
    ],
)
def test_bad_arguments_are_named(name, change):
    batch = make_batch([(9, causal_rows(9, 2))])
    if "key_cache" in change:
        change = {**change, "value_cache": change["key_cache"]}
    batch.__dict__.update(change)
    with pytest.raises(ValueError, match=rf"^{name}:"):
        batch.run(tree_attention)


def test_splits_follow_the_lengths(monkeypatch):
    """A long request is split among the programs that a launch has beyond its blocks, however many
    short ones there are; these write their output themselves."""
    created = []
    new_empty = torch.Tensor.new_empty

    def record(*args, **kwargs):
        created.append(new_empty(*args, **kwargs))
        return created[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", record)
    short = [(20, tree_rows(16, [0, 0, 1]))] * 3
    batch = make_batch([*short, (400, causal_rows(400, 2)), *short], 2, 1)
    for more, min_tiles, wanted in ((10, 2, 7), (10, 5, 5), (3, 2, 2), (10, 400, 0)):
        monkeypatch.setattr(kernel, "MORE_PROGRAMS", more)
        output = batch.run(tree_attention_triton, min_tiles=min_tiles)
        assert_close(batch.run(tree_attention_reference)[:-3], output[:-3])
        lse = [tensor for tensor in created if tensor.dim() == 3][-1]
        assert len(lse) == 2 * more
        # 25 of the 37 tiles are the long request's
        parts = int((~lse.isnan()).any(dim=2).sum())
        assert parts == wanted
        assert lse[:parts, 0, :4].isfinite().all()
