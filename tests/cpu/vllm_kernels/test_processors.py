# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu import structured_outputs
from vllm.v1.worker.gpu.sample import (
    bad_words,
    logit_bias,
    penalties,
    thinking_budget,
)

from helpers.interpreted import assert_host_matches, bounds, floats, ints, strided

SLOTS = 7
MODEL_LEN = 40
SEEDS = range(5)


def _batch(rng: np.random.Generator, vocab_size: int) -> SimpleNamespace:
    """Requests with a few drafted tokens each, all rows of them having logits."""
    num_reqs = int(rng.integers(1, 5))
    counts = rng.integers(1, 6, num_reqs)
    idx_mapping = rng.permutation(SLOTS)[:num_reqs]
    num_rows = int(counts.sum())
    prompt_len = rng.integers(1, 12, SLOTS)
    return SimpleNamespace(
        idx_mapping=ints(idx_mapping, torch.int64),
        rows=ints(np.repeat(idx_mapping, counts), torch.int64),
        local_pos=ints(np.concatenate([np.arange(count) for count in counts])),
        bounds=bounds(counts),
        logits=strided(floats(rng.normal(0, 3, (num_rows, vocab_size)))),
        input_ids=ints(rng.integers(0, vocab_size, num_rows)),
        all_token_ids=strided(ints(rng.integers(0, vocab_size, (SLOTS, MODEL_LEN)))),
        prompt_len=ints(prompt_len),
        total_len=ints(prompt_len + rng.integers(0, MODEL_LEN - 12, SLOTS)),
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_penalties(seed):
    vocab_size = 77

    def scenario(rng):
        batch = _batch(rng, vocab_size)
        drafts = batch.input_ids
        drafts[ints(rng.random(drafts.shape) < 0.5, torch.bool)] = -1
        penalties.apply_penalties(
            batch.logits,
            batch.rows,
            drafts,
            batch.local_pos,
            floats(rng.choice([1.0, 1.3, 0.8], SLOTS)),
            floats(rng.choice([0.0, 0.7, -0.2], SLOTS)),
            floats(rng.choice([0.0, 0.9], SLOTS)),
            strided(ints(rng.integers(-(2**31), 2**31, (SLOTS, 3)))),
            strided(ints(rng.integers(0, 3, (SLOTS, vocab_size)))),
        )
        return batch.logits

    # numpy and torch may contract a multiplication and a subtraction differently.
    assert_host_matches(scenario, seed, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_token_counts(seed):
    vocab_size = 77

    def scenario(rng):
        batch = _batch(rng, vocab_size)
        mask = strided(ints(rng.integers(-(2**31), 2**31, (SLOTS, 3))))
        counts = strided(ints(rng.integers(0, 3, (SLOTS, vocab_size))))
        penalties.bincount(
            batch.idx_mapping,
            batch.all_token_ids,
            batch.prompt_len,
            batch.total_len,
            mask,
            counts,
            int(batch.total_len.max()),
        )
        return mask, counts

    assert_host_matches(scenario, seed)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("check_all_masked", [False, True])
def test_bias(seed, check_all_masked):
    vocab_size, width = 45, 8

    def listed(rng):
        """Distinct tokens, as in a set: the order of writes to one token is the kernel's own."""
        return np.stack([rng.permutation(vocab_size)[:width] for _ in range(SLOTS)])

    def counted(rng):
        return ints(rng.integers(0, width + 1, SLOTS) * rng.integers(0, 2, SLOTS))

    def scenario(rng):
        batch = _batch(rng, vocab_size)
        stops = listed(rng)
        # Rows where only stop tokens are left, one of them at infinity.
        stuck = ints(rng.random(batch.logits.shape[0]) < 0.5, torch.bool)
        for row in stuck.nonzero().view(-1).tolist():
            kept = stops[batch.rows[row], :3]
            values = batch.logits[row, kept]
            values[0] = float("inf")
            batch.logits[row] = float("-inf")
            batch.logits[row, kept] = values
        num_allowed = counted(rng) * ints(rng.random(SLOTS) < 0.3)
        logit_bias.apply_logit_bias(
            batch.logits,
            batch.rows,
            ints(rng.integers(4, 8, batch.rows.numel()), torch.int64),
            num_allowed,
            strided(ints(listed(rng))),
            counted(rng),
            strided(ints(listed(rng))),
            strided(floats(rng.normal(0, 9, (SLOTS, width)))),
            ints(rng.integers(5, 9, SLOTS)),
            counted(rng),
            ints(rng.integers(0, 2, SLOTS)),
            strided(ints(stops)),
            check_all_masked,
        )
        return batch.logits

    assert_host_matches(scenario, seed)


@pytest.mark.parametrize("seed", range(10))
def test_bad_words(seed):
    vocab_size, max_words = 3, 5  # a small vocabulary, so that words occur

    def scenario(rng):
        batch = _batch(rng, vocab_size)
        lengths = rng.integers(1, 5, (SLOTS, max_words))
        offsets = np.concatenate([np.zeros((SLOTS, 1), int), lengths.cumsum(axis=1)], axis=1)
        num_words = rng.integers(0, max_words + 1, SLOTS)
        # Some outputs are shorter than a word.
        batch.total_len = torch.minimum(batch.total_len, batch.prompt_len + 2)
        bad_words.apply_bad_words(
            batch.logits,
            batch.rows,
            strided(ints(rng.integers(0, vocab_size, (SLOTS, 4 * max_words)))),
            strided(ints(offsets)),
            ints(num_words),
            batch.all_token_ids,
            batch.prompt_len,
            batch.total_len,
            batch.input_ids,
            batch.local_pos,
            max(1, int(num_words.max())),
        )
        return batch.logits

    assert_host_matches(scenario, seed)


@pytest.mark.parametrize("seed", range(24))
def test_thinking_budget(seed, monkeypatch):
    # Blocks small enough for the backward scan to take several.
    monkeypatch.setattr(thinking_budget, "_COLD_SCAN_BLOCK", 4)
    vocab_size = 4

    def scenario(rng):
        batch = _batch(rng, vocab_size)
        start, natural_end, end = (
            ints(rng.integers(0, vocab_size, rng.integers(1, 4))) for _ in range(3)
        )
        is_cold = ints(rng.random(SLOTS) < 0.5, torch.bool)
        cached = [ints(rng.integers(-1, 4, SLOTS)) for _ in range(2)]
        scan_pos = ints(rng.integers(0, MODEL_LEN, SLOTS))
        for values, cold in zip([*cached, scan_pos], [-1, -1, 0], strict=True):
            values[is_cold] = cold
        thinking_budget.apply_thinking_budget(
            batch.logits,
            batch.idx_mapping,
            batch.rows,
            ints(rng.integers(-1, 6, SLOTS)),
            batch.all_token_ids,
            batch.total_len,
            batch.input_ids,
            batch.local_pos,
            *cached,
            scan_pos,
            start,
            natural_end,
            end,
        )
        return batch.logits, cached, scan_pos

    assert_host_matches(scenario, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_grammar_bitmask(seed):
    vocab_size, stride = 77, 6

    def scenario(rng):
        batch = _batch(rng, vocab_size)
        num_reqs = batch.idx_mapping.numel()
        # Masks of all positions of some requests, also of positions without logits.
        keys = np.arange(num_reqs * stride)[np.repeat(rng.random(num_reqs) < 0.7, stride)]
        if keys.size == 0:
            keys = np.arange(stride)
        bitmask = strided(ints(rng.integers(-(2**31), 2**31, (keys.size, 3))))
        # As vLLM's own caller does, which needs CUDA streams before it gets here.
        structured_outputs._apply_grammar_bitmask_kernel[(keys.size, 1)](
            batch.logits,
            batch.logits.stride(0),
            ints(keys),
            batch.bounds,
            bitmask,
            bitmask.stride(0),
            vocab_size,
            MASK_STRIDE=stride,
            BLOCK_SIZE=8192,
        )
        return batch.logits

    assert_host_matches(scenario, seed)
