# SPDX-License-Identifier: Apache-2.0
"""vLLM's seeded Gumbel noise: MurmurHash3 of (seed, position, token), bit for bit.

The token is hashed last, so the mixed tokens are one table per vocabulary size, and the rest of the
key is one number per row.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

DRAFT_NOISE_SALT = 1 << 30
"""What vLLM adds to a draft's positions, to keep the noise of draft and target apart."""

_HIGH_WORD_DOMAIN = 0x9E3779B9
_CHUNK_ELEMENTS = 1 << 16
"""Elements hashed at once: few enough to stay in cache for the fifteen passes over them."""


def gumbel_noise(
    # [num_rows]
    seeds: torch.Tensor,
    # [num_rows]
    positions: torch.Tensor,
    vocab_size: int,
    use_fp64: bool = False,
) -> torch.Tensor:
    """Gumbel noise for every row and token, `[num_rows, vocab_size]` fp32, or fp64 if asked for."""
    if use_fp64:
        return uniform64(seeds, positions, vocab_size).log_().neg_().log_().neg_()
    # -log1p(-u) takes large noise from u near 0, where fp32 is precise. A u that was rounded to 1
    # is clamped, since log1p(-1) is infinite.
    uniform = uniform32(seeds, positions, vocab_size).clamp_(max=1 - 2**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def uniform32(
    # [num_rows]
    seeds: torch.Tensor,
    # [num_rows]
    positions: torch.Tensor,
    vocab_size: int,
) -> torch.Tensor:
    """Uniforms in (0, 1] of 32 random bits, `[num_rows, vocab_size]` fp32."""
    uniform = np.empty((seeds.shape[0], vocab_size), np.float32)
    for rows, bits in _hash_chunks(seeds, positions, vocab_size):
        # Exact in fp64 and rounded once, as the sum of the kernel's two exact fp32 halves is.
        np.multiply(bits + 0.5, 2.0**-32, out=uniform[rows], casting="same_kind")
    return torch.from_numpy(uniform)


def uniform64(
    # [num_rows]
    seeds: torch.Tensor,
    # [num_rows]
    positions: torch.Tensor,
    vocab_size: int,
) -> torch.Tensor:
    """Uniforms in (0, 1) of 53 random bits, `[num_rows, vocab_size]` fp64."""
    uniform = np.empty((seeds.shape[0], vocab_size), np.float64)
    low_words = _hash_chunks(seeds, positions, vocab_size)
    high_words = _hash_chunks(seeds, positions, vocab_size, _HIGH_WORD_DOMAIN)
    for (rows, low), (_, high) in zip(low_words, high_words, strict=True):
        bits = (high.astype(np.uint64) << np.uint64(32) | low) >> np.uint64(11)
        # The largest value would round to 1, whose logarithm's logarithm does not exist.
        np.minimum((bits + 0.5) * 2.0**-53, 1 - 2.0**-53, out=uniform[rows])
    return torch.from_numpy(uniform)


def _hash_chunks(
    # [num_rows]
    seeds: torch.Tensor,
    # [num_rows]
    positions: torch.Tensor,
    vocab_size: int,
    domain: int = 0,
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield slices of the rows with their MurmurHash3 words, `[num_chunk_rows, vocab_size]` uint32.

    Each chunk overwrites the words of the one before.
    """
    seed_words = seeds.numpy().astype(np.int64).view(np.uint64)
    position_words = positions.numpy().astype(np.int64).view(np.uint64)
    prefix = np.full(seed_words.shape, domain, np.uint32)
    for word in (seed_words, seed_words >> np.uint64(32), position_words):
        prefix ^= _mixed_key(word.astype(np.uint32))
        _stir(prefix, np.empty_like(prefix))

    keys = _token_keys(vocab_size)
    chunk = min(max(1, _CHUNK_ELEMENTS // vocab_size), prefix.size)
    words = np.empty((chunk, vocab_size), np.uint32)
    spare = np.empty_like(words)
    for begin in range(0, prefix.size, chunk):
        rows = slice(begin, min(begin + chunk, prefix.size))
        out, temp = words[: rows.stop - begin], spare[: rows.stop - begin]
        np.bitwise_xor(prefix[rows, None], keys, out=out)
        _stir(out, temp)
        out ^= np.uint32(16)  # bytes hashed
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            out ^= np.right_shift(out, np.uint32(shift), out=temp)
            out *= np.uint32(factor)
        out ^= np.right_shift(out, np.uint32(16), out=temp)
        yield rows, out


@lru_cache(maxsize=8)
def _token_keys(vocab_size: int) -> np.ndarray:
    """The mixed key of every token id, `[vocab_size]` uint32."""
    return _mixed_key(np.arange(vocab_size, dtype=np.uint32))


def _mixed_key(
    # [...], uint32
    key: np.ndarray,
) -> np.ndarray:
    """MurmurHash3's scrambling of one key word."""
    key = key * np.uint32(0xCC9E2D51)
    key = (key << np.uint32(15)) | (key >> np.uint32(17))
    return key * np.uint32(0x1B873593)


def _stir(
    # [...], uint32, changed in place
    state: np.ndarray,
    # like state
    temp: np.ndarray,
) -> None:
    """MurmurHash3's step after a key was added to `state`."""
    np.right_shift(state, np.uint32(19), out=temp)
    state <<= np.uint32(13)
    state |= temp
    state *= np.uint32(5)
    state += np.uint32(0xE6546B64)
