# SPDX-License-Identifier: Apache-2.0
"""Counter-based random numbers: a hash of (seed, root position, node, purpose, element).

There is no state: every rank and every replay of a step draws the same numbers, and no two draws
share noise. `rng_device.py` holds the same functions for Triton kernels; hashes and uniforms are
equal bit by bit. The mixing steps are those of MurmurHash3 (32 bits). Here they run on int32
tensors: two's-complement products, sums and left shifts have the same bits as the unsigned ones,
and only right shifts need a mask.
"""

from functools import lru_cache

import torch

# The purposes that a number may have. They never share noise: verification is only lossless if its
# draws are independent of the draft's.
CHILD = 0  # which off-hub token is drafted
ACCEPT = 2  # whether verification accepts a node
RESIDUAL = 3  # which token is emitted at the path's end

# Murmur's constants, as unsigned 32-bit integers.
MIX_FIRST = 0xCC9E2D51
MIX_SECOND = 0x1B873593
MIX_ADD = 0xE6546B64
FINAL_FIRST = 0x85EBCA6B
FINAL_SECOND = 0xC2B2AE35

# A row's tokens are divided into lanes: token i is in lane i % LANES. A draw first takes a lane in
# proportion to its mass, then one of the lane's tokens, both by the least `exponential / weight`.
# So a row costs LANES random numbers and a few more. One for each token would cost more time than
# reading the row.
LANES = 2048
# The elements of a node's next draw begin this much further on.
DRAW_STRIDE = 1 << 16

# The largest float32 below 1.
BELOW_ONE = 1.0 - 2.0**-24
# Below this, -log(1 - u) is summed as a series: 1 - u would round away what u holds.
SERIES_LIMIT = 2.0**-8


def _signed(constant: int) -> int:
    return constant - (1 << 32) if constant >= 1 << 31 else constant


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    return (value >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _rotate_left(value: torch.Tensor, bits: int) -> torch.Tensor:
    return (value << bits).bitwise_or_(_shift_right(value, 32 - bits))


def _scramble(word: torch.Tensor) -> torch.Tensor:
    return _rotate_left(word * _signed(MIX_FIRST), 15).mul_(_signed(MIX_SECOND))


def _mix(state: torch.Tensor, scrambled: torch.Tensor) -> torch.Tensor:
    return _rotate_left(state ^ scrambled, 13).mul_(5).add_(_signed(MIX_ADD))


def _finalize(state: torch.Tensor) -> torch.Tensor:
    state = (state ^ _shift_right(state, 16)).mul_(_signed(FINAL_FIRST))
    state.bitwise_xor_(_shift_right(state, 13)).mul_(_signed(FINAL_SECOND))
    return state.bitwise_xor_(_shift_right(state, 16))


@lru_cache(maxsize=32)
def _scrambled_range(first: int, size: int, device: torch.device) -> torch.Tensor:
    return _scramble(torch.arange(first, first + size, dtype=torch.int32, device=device))


def row_key(
    # [...]
    seed: torch.Tensor,
    # [...]
    position: torch.Tensor,
    # [...]
    node: torch.Tensor | int,
    purpose: int,
) -> torch.Tensor:
    """Hash what identifies one draw.

    Args:
        seed: int64, the request's seed; all 64 bits count.
        position: int64, the sequence position of the tree's root; the low 32 bits count.
        node: integer, breadth-first node id.
        purpose: CHILD, ACCEPT or RESIDUAL.

    Returns:
        int32, broadcast over the arguments: the key's 32 bits.
    """
    state = _mix(torch.zeros_like(seed, dtype=torch.int32), _scramble(seed.to(torch.int32)))
    state = _mix(state, _scramble((seed >> 32).to(torch.int32)))
    state = _mix(state, _scramble(position.to(torch.int32)))
    node = torch.as_tensor(node, device=seed.device).to(torch.int32)
    return _finalize(_mix(state, _scramble(node * 4 + purpose)))


def element_hash(
    # [...]
    key: torch.Tensor,
    size: int,
    first: int = 0,
) -> torch.Tensor:
    """Hash `size` elements from `first` on under each key (int32). Returns int32 [..., size]."""
    elements = _scrambled_range(first, size, key.device)
    return _finalize(_mix(key.unsqueeze(-1), elements))


def uniform(
    # [...]
    bits: torch.Tensor,
) -> torch.Tensor:
    """Turn 32 hash bits into a uniform float32 in (0, 1): (bits + 1/2) / 2^32, correctly rounded.

    Near 0 the result keeps all 32 bits, which 24-bit uniforms lose; near 1 it is clamped.
    """
    high = _shift_right(bits, 16).to(torch.float32)
    low = (bits & 0xFFFF).to(torch.float32)
    # Both terms are exact, so the sum rounds once.
    return high.mul_(2.0**-16).add_(low.add_(0.5).mul_(2.0**-32)).clamp_(max=BELOW_ONE)


def exponential(
    # [...]
    bits: torch.Tensor,
) -> torch.Tensor:
    """Turn 32 hash bits into a standard exponential variate, float32 in (0, 17).

    Where 1 - u would round, a series of -log(1 - u) takes its place.
    The token with the least `exponential / weight` is a draw from the weights. Small variates carry
    full relative precision, so improbable tokens are drawn as often as they should be.
    """
    u = uniform(bits)
    # u + u^2/2 + u^3/3 + u^4/4
    series = (u * 0.25).add_(1.0 / 3.0).mul_(u).add_(0.5).mul_(u).add_(1.0).mul_(u)
    return torch.where(u < SERIES_LIMIT, series, u.neg().add_(1.0).log_().neg_())


def lanes(
    # [num_rows, vocab_size]
    row: torch.Tensor,
    # fills up lanes that have one token less
    filler: float,
) -> torch.Tensor:
    """Divide rows into lanes. Returns [num_rows, tokens per lane, lanes], without empty lanes."""
    num_lanes = min(LANES, row.shape[1])
    missing = -row.shape[1] % num_lanes
    row = torch.nn.functional.pad(row, (0, missing), value=filler)
    return row.unflatten(1, (-1, num_lanes))


def draw(
    # [num_rows, vocab_size]
    weights: torch.Tensor,
    # [num_rows]
    key: torch.Tensor,
    number: int = 0,
) -> torch.Tensor:
    """Draw a token of each row in proportion to its weight. Returns int64 [num_rows], 0 for a row
    without any weight.

    Args:
        weights: float32.
        key: int32, from `row_key`.
        number: which of the independent draws under the key.
    """
    by_lane = lanes(weights, 0.0)
    _, depth, num_lanes = by_lane.shape
    first = number * DRAW_STRIDE
    noise = exponential(element_hash(key, num_lanes, first))
    lane = (by_lane.sum(dim=1) / noise).argmax(dim=1, keepdim=True)
    if depth == 1:
        return lane.squeeze(1)
    own = by_lane.gather(2, lane.unsqueeze(1).expand(-1, depth, 1)).squeeze(2)
    noise = exponential(element_hash(key, depth, first + LANES))
    return ((own / noise).argmax(dim=1, keepdim=True) * num_lanes + lane).squeeze(1)


def best(
    # [num_rows, vocab_size]
    row: torch.Tensor,
) -> torch.Tensor:
    """int64 [num_rows]: the largest element's index; of a tie the first lane's, and its first."""
    by_lane = lanes(row, -torch.inf)
    peaks, places = by_lane.max(dim=1)
    lane = peaks.argmax(dim=1, keepdim=True)
    return (places.gather(1, lane) * by_lane.shape[2] + lane).squeeze(1)
