# SPDX-License-Identifier: Apache-2.0
"""The counter-based generator: its bits, its distribution, and that streams are separate."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from scipy import stats

from vllm_spechub.triton_kernels import rng, rng_device

PURPOSES = [rng.CHILD, rng.ACCEPT, rng.RESIDUAL]
EDGE_INTEGERS = [0, 1, -1, 2**31 - 1, 2**31, 2**32, -(2**63), 2**63 - 1, 0x123456789ABCDEF]


@triton.jit
def _rng_kernel(
    # [num_rows]
    seed_ptr,
    # [num_rows]
    position_ptr,
    # [num_rows]
    node_ptr,
    # [num_rows]
    key_ptr,
    # [num_rows, SIZE]
    hash_ptr,
    # [num_rows, SIZE]
    uniform_ptr,
    # [num_rows, SIZE]
    exponential_ptr,
    PURPOSE: tl.constexpr,
    SIZE: tl.constexpr,
):
    row = tl.program_id(0)
    key = rng_device.row_key(
        tl.load(seed_ptr + row), tl.load(position_ptr + row), tl.load(node_ptr + row), PURPOSE
    )
    index = tl.arange(0, SIZE)
    bits = rng_device.element_hash(key, index)
    tl.store(key_ptr + row, key.to(tl.int32, bitcast=True))
    tl.store(hash_ptr + row * SIZE + index, bits.to(tl.int32, bitcast=True))
    tl.store(uniform_ptr + row * SIZE + index, rng_device.uniform(bits))
    tl.store(exponential_ptr + row * SIZE + index, rng_device.exponential(bits))


def exact_row_key(seed: int, position: int, node: int, purpose: int) -> int:
    """The key in Python's integers."""
    mask = 0xFFFFFFFF

    def rotate(value: int, bits: int) -> int:
        return ((value << bits) | (value >> (32 - bits))) & mask

    state = 0
    for word in (seed & mask, (seed >> 32) & mask, position & mask, node * 4 + purpose):
        scrambled = rotate(word * 0xCC9E2D51 & mask, 15) * 0x1B873593 & mask
        state = (rotate(state ^ scrambled, 13) * 5 + 0xE6546B64) & mask
    state = (state ^ (state >> 16)) * 0x85EBCA6B & mask
    state = (state ^ (state >> 13)) * 0xC2B2AE35 & mask
    return state ^ (state >> 16)


def exact_element_hash(key: int, element: int) -> int:
    """In Python's integers: what follows the last word of a key."""
    mask = 0xFFFFFFFF
    scrambled = element * 0xCC9E2D51 & mask
    scrambled = ((scrambled << 15) | (scrambled >> 17)) * 0x1B873593 & mask
    state = key ^ scrambled
    state = (((state << 13) | (state >> 19)) & mask) * 5 + 0xE6546B64 & mask
    state = (state ^ (state >> 16)) * 0x85EBCA6B & mask
    state = (state ^ (state >> 13)) * 0xC2B2AE35 & mask
    return state ^ (state >> 16)


def from_bits(values: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.uint32).view(np.int32))


def as_unsigned(bits: torch.Tensor) -> np.ndarray:
    return bits.numpy().view(np.uint32)


def test_row_key_equals_exact_arithmetic():
    seeds = torch.tensor(EDGE_INTEGERS).unsqueeze(1)
    positions = torch.tensor([0, 1, 4095, 2**31 - 1])
    for node in (0, 1, 63):
        for purpose in PURPOSES:
            keys = as_unsigned(rng.row_key(seeds, positions, node, purpose))
            for i, seed in enumerate(EDGE_INTEGERS):
                for j, position in enumerate(positions.tolist()):
                    assert keys[i, j] == exact_row_key(seed, position, node, purpose)


@pytest.mark.parametrize("purpose", PURPOSES)
def test_kernel_gives_the_same_bits(purpose, device):
    seeds = torch.tensor(EDGE_INTEGERS)
    num_rows, size = len(seeds), 256
    positions = torch.arange(num_rows) * 1000003
    nodes = torch.arange(num_rows, dtype=torch.int32) * 7
    key = torch.empty(num_rows, dtype=torch.int32, device=device)
    bits = torch.empty(num_rows, size, dtype=torch.int32, device=device)
    uniform = torch.empty(num_rows, size, device=device)
    exponential = torch.empty(num_rows, size, device=device)
    inputs = (value.to(device) for value in (seeds, positions, nodes))
    _rng_kernel[(num_rows,)](*inputs, key, bits, uniform, exponential, PURPOSE=purpose, SIZE=size)
    expected = rng.row_key(seeds, positions, nodes, purpose)
    assert torch.equal(key.cpu(), expected)
    expected = rng.element_hash(expected, size)
    assert torch.equal(bits.cpu(), expected)
    assert torch.equal(uniform.cpu(), rng.uniform(expected))
    torch.testing.assert_close(exponential.cpu(), rng.exponential(expected), rtol=1e-5, atol=0)


def test_uniform_edges():
    bits = [0, 1, 255, 2**16, 2**24, 2**31, 2**32 - 256, 2**32 - 1]
    values = rng.uniform(from_bits(bits)).double().tolist()
    assert values[0] > 0
    assert values[-1] == 1 - 2**-24
    for bit, value in zip(bits, values, strict=True):
        assert value == pytest.approx((bit + 0.5) / 2**32, rel=2**-24)


def test_exponential_keeps_the_tail_and_is_finite():
    near_limit = [2**24 + offset for offset in (-2, -1, 0, 1)]
    bits = [0, 1, 2, 1000, 2**20, *near_limit, 2**30, 2**31, 2**32 - 2**20]
    values = rng.exponential(from_bits(bits)).double().tolist()
    for bit, value in zip(bits, values, strict=True):
        # Beyond the series, rounding 1 - u leaves an absolute error of 2^-25.
        assert value == pytest.approx(-math.log1p(-(bit + 0.5) / 2**32), rel=1e-5)
    assert values[0] < values[1] < values[2] < 1e-9
    assert rng.exponential(from_bits([2**32 - 1])).item() == pytest.approx(24 * math.log(2))


def test_streams_are_separate():
    """No two draws of a tree share a key, and their noise does not correlate."""
    node = torch.arange(64)
    seed = torch.tensor([1, 2, -1]).reshape(-1, 1, 1)
    position = torch.arange(20).unsqueeze(1)
    keys = torch.stack([rng.row_key(seed, position, node, purpose) for purpose in PURPOSES])
    assert keys.unique().numel() == keys.numel()

    noise = rng.uniform(rng.element_hash(keys[:, 0, 0, :4].flatten(), 20_000)).numpy()
    correlation = np.corrcoef(noise) - np.eye(len(noise))
    assert abs(correlation).max() < 5 / math.sqrt(20_000)


@pytest.mark.parametrize("axis", ["element", "seed", "position"])
def test_uniforms_are_uniform(axis):
    count = torch.arange(200_000)
    zero = torch.zeros(1, dtype=torch.int64)
    if axis == "element":
        bits = rng.element_hash(rng.row_key(zero, zero, 0, rng.CHILD), len(count)).flatten()
    elif axis == "seed":
        bits = rng.row_key(count, zero, 3, rng.ACCEPT)
    else:
        bits = rng.row_key(zero, count, 3, rng.ACCEPT)
    assert stats.kstest(rng.uniform(bits).numpy(), "uniform").pvalue > 1e-3
    low_byte = np.bincount(as_unsigned(bits) & 0xFF, minlength=256)
    assert stats.chisquare(low_byte).pvalue > 1e-3
    # Neighbours are independent.
    pairs = rng.uniform(bits).numpy()
    cells = np.histogram2d(pairs[:-1:2], pairs[1::2], bins=16)[0]
    assert stats.chisquare(cells.flatten()).pvalue > 1e-3


def test_exponentials_are_exponential():
    key = rng.row_key(torch.tensor([5]), torch.tensor([6]), 7, rng.RESIDUAL)
    values = rng.exponential(rng.element_hash(key, 200_000)).flatten().numpy()
    assert stats.kstest(values, "expon").pvalue > 1e-3


@pytest.mark.parametrize("lanes", [1, 4, 11, rng.LANES])
def test_draws_follow_their_weights(monkeypatch, lanes):
    """Whatever the lanes are: alike and unlike, empty, and with one token less than others."""
    monkeypatch.setattr(rng, "LANES", lanes)
    weights = torch.tensor([3.0, 0.0, 1.0, 5.0, 2.0, 0.0, 0.5, 0.0, 4.0, 0.0, 0.25])
    count = 40_000
    zero = torch.zeros(count, dtype=torch.int64)
    key = rng.row_key(torch.arange(count), zero, 3, rng.RESIDUAL)
    observed = np.bincount(rng.draw(weights.expand(count, -1), key), minlength=len(weights))
    support = weights > 0
    assert observed[~support].sum() == 0
    expected = (weights.double() / weights.double().sum() * count)[support]
    assert stats.chisquare(observed[support], expected).pvalue > 1e-4
    assert (rng.draw(torch.zeros(5, 11), key[:5]) == 0).all()


def test_elements_from_any_first_on():
    """A row of hashes that begins later is the same row's rest: what kernels and draws rely on."""
    key = rng.row_key(torch.tensor([7, -9]), torch.tensor([3, 4]), 2, rng.CHILD)
    whole = rng.element_hash(key, 5000)
    for first in (1, rng.LANES, 4095):
        assert torch.equal(rng.element_hash(key, 50, first), whole[:, first : first + 50])
    far = rng.element_hash(key, 10, 3 * rng.DRAW_STRIDE)
    exact = [
        [exact_element_hash(int(k), 3 * rng.DRAW_STRIDE + i) for i in range(10)]
        for k in as_unsigned(key)
    ]
    assert as_unsigned(far).tolist() == exact


@pytest.mark.parametrize("lanes", [4, rng.LANES])
def test_numbered_draws_are_independent(monkeypatch, lanes):
    """Draws under one key: each from the weights, jointly as independent; number 0 by default."""
    monkeypatch.setattr(rng, "LANES", lanes)
    weights, count = torch.tensor([3.0, 1.0, 0.0, 2.0, 1.0, 5.0]), 40_000
    zero = torch.zeros(count, dtype=torch.int64)
    key = rng.row_key(torch.arange(count), zero, 3, rng.CHILD)
    drawn = [rng.draw(weights.expand(count, -1), key, number) for number in range(4)]
    assert torch.equal(drawn[0], rng.draw(weights.expand(count, -1), key))
    probs = (weights / weights.sum()).double().numpy()
    support = np.flatnonzero(np.outer(probs, probs).flatten())
    for first, second in ((0, 1), (0, 3), (1, 2)):
        cells = np.bincount(drawn[first] * 6 + drawn[second], minlength=36)
        assert cells.sum() == cells[support].sum()
        expected = np.outer(probs, probs).flatten()[support] * count
        assert stats.chisquare(cells[support], expected).pvalue > 1e-4


def test_numbers_never_share_noise():
    """The largest vocabulary's lanes and places of one draw end before the next one's begin."""
    assert rng.LANES + (1 << 20) // rng.LANES < rng.DRAW_STRIDE


@pytest.mark.parametrize("lanes", [1, 3, rng.LANES])
def test_best_takes_the_first_lane_of_a_tie(monkeypatch, lanes):
    monkeypatch.setattr(rng, "LANES", lanes)
    rows = torch.randint(0, 4, (200, 11), generator=torch.Generator().manual_seed(1)).float()
    rows[0] = -torch.inf
    rows[1, 1:] = -torch.inf
    width = min(lanes, 11)
    for row, found in zip(rows.tolist(), rng.best(rows).tolist(), strict=True):
        ties = [token for token in range(11) if row[token] == max(row)]
        assert found == min(ties, key=lambda token: (token % width, token))
