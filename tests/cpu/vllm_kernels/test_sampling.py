# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample import gumbel, logprob, min_p, prompt_logprob

from helpers.interpreted import assert_host_matches, bounds, floats, ints, strided
from vllm_spechub.cpu.vllm_kernels.gumbel import uniform32, uniform64

SLOTS = 9
VOCAB = 1283
"""Odd, and more than one block of the Gumbel kernel."""
SEEDS = [0, 1, 2]
INT64 = np.iinfo(np.int64)


def _logits(
    rng: np.random.Generator, num_rows: int, vocab_size: int = VOCAB, dtype=torch.float32
) -> torch.Tensor:
    """Strided rows with ties and some tokens masked."""
    values = np.round(rng.normal(0, 3, (num_rows, vocab_size)), 1)
    values[rng.random(values.shape) < 0.2] = -np.inf
    return strided(floats(values, dtype))


def _rows(rng: np.random.Generator, num_rows: int) -> torch.Tensor:
    return ints(rng.integers(0, SLOTS, num_rows), torch.int64)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_temperature(seed, dtype):
    def scenario(rng):
        logits = _logits(rng, 7, dtype=dtype)
        temps = floats(rng.choice([0.0, 1.0, 0.3, 1.7], SLOTS))
        gumbel.apply_temperature(logits, _rows(rng, 7), temps)
        return logits

    assert_host_matches(scenario, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("use_fp64", [False, True])
@pytest.mark.parametrize("is_drafting", [False, True])
@pytest.mark.parametrize("cache", [None, "one column", "column per row"])
def test_gumbel_sampling(seed, use_fp64, is_drafting, cache):
    def scenario(rng):
        num_rows, num_cols = 6, 4
        dtype = torch.bfloat16 if cache == "one column" else torch.float32
        logits = _logits(rng, num_rows, dtype=dtype)
        # Distinct requests: rows of one would race for its cache.
        idx_mapping = ints(rng.permutation(SLOTS)[:num_rows], torch.int64)
        idx_mapping[ints(rng.random(num_rows) < 0.3, torch.bool)] = -1
        options = {}
        if cache is not None:
            shape = (SLOTS, num_cols, VOCAB + 5)
            cols = rng.integers(0, num_cols, num_rows)
            options = {
                "logits_cache": torch.empty(shape, dtype=dtype),
                "logits_cache_col": ints(cols if cache == "column per row" else cols[0]),
            }
            if cache == "column per row":
                options["logits_cache_source"] = _logits(rng, num_rows)
        sampled = gumbel.gumbel_sample(
            logits,
            idx_mapping,
            floats(rng.choice([0.0, 1.0, 0.3, 1.7], SLOTS)),
            ints(rng.integers(INT64.min, INT64.max, SLOTS), torch.int64),
            ints(rng.integers(0, 1 << 20, num_rows), torch.int64),
            apply_temperature=seed % 2 == 0,
            is_drafting=is_drafting,
            use_fp64=use_fp64,
            **options,
        )
        return sampled, options.get("logits_cache", sampled)

    assert_host_matches(scenario, seed)


@pytest.mark.parametrize("use_fp64", [False, True])
def test_gumbel_block_maxima(use_fp64, monkeypatch):
    """The scores themselves, not only which one wins."""
    # vLLM's launcher keeps the maxima to itself, so they are caught where it reads them.
    maxima = []
    argmax = torch.Tensor.argmax
    monkeypatch.setattr(
        torch.Tensor, "argmax", lambda self, **kw: (maxima.append(self), argmax(self, **kw))[1]
    )

    def scenario(rng):
        maxima.clear()
        gumbel.gumbel_sample(
            _logits(rng, 9, vocab_size=5000),
            torch.arange(SLOTS),
            floats([0.0, 1.0, 0.5] * 3),
            ints(rng.integers(INT64.min, INT64.max, SLOTS), torch.int64),
            ints(rng.integers(0, 1 << 20, SLOTS), torch.int64),
            apply_temperature=True,
            is_drafting=False,
            use_fp64=use_fp64,
        )
        (scores,) = maxima
        return scores.clone()

    # vLLM's fp32 noise is a series with an absolute error of 6e-7 before the outer logarithm.
    tolerance = 1e-12 if use_fp64 else 1e-5
    assert_host_matches(scenario, 0, rtol=tolerance, atol=tolerance)


@triton.jit
def _uniform_kernel(out_ptr, seed_ptr, pos_ptr, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    token = tl.arange(0, BLOCK)
    seed, pos = tl.load(seed_ptr + row), tl.load(pos_ptr + row)
    if WIDE:
        uniform = gumbel.murmur3_uniform64(seed, pos, token)
    else:
        uniform = gumbel.murmur3_uniform32(seed, pos, token)
    tl.store(out_ptr + row * n + token, uniform, mask=token < n)


@pytest.mark.parametrize("wide", [False, True])
def test_uniforms_are_bit_identical(wide):
    rng = np.random.default_rng(0)
    edges = [0, 1, -1, INT64.min, INT64.max, 0xFFFFFFFF, 1 << 32]
    seeds = ints(edges + rng.integers(INT64.min, INT64.max, 20).tolist(), torch.int64)
    pos = ints(rng.integers(0, 1 << 31, seeds.numel()), torch.int64)
    pos[:2] = torch.tensor([0, (1 << 30) + 7])
    dtype, ours = (torch.float64, uniform64) if wide else (torch.float32, uniform32)
    expected = torch.empty(seeds.numel(), VOCAB, dtype=dtype)
    _uniform_kernel[(seeds.numel(),)](expected, seeds, pos, VOCAB, WIDE=wide, BLOCK=2048)
    assert torch.equal(ours(seeds, pos, VOCAB), expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_min_p(seed, dtype):
    def scenario(rng):
        logits = _logits(rng, 7, dtype=dtype)
        min_p.apply_min_p(logits, _rows(rng, 7), floats(rng.choice([0.0, 0.1, 0.5, 1.0], SLOTS)))
        return logits

    assert_host_matches(scenario, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_of_tokens(seed, dtype):
    def scenario(rng):
        num_rows, num_ids = 5, int(rng.integers(1, 40))
        token_ids = strided(ints(rng.integers(0, VOCAB, (num_rows, num_ids)), torch.int64))
        return logprob.compute_token_logprobs(_logits(rng, num_rows, dtype=dtype), token_ids)

    assert_host_matches(scenario, seed, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_logprobs", [0, 3])
@pytest.mark.parametrize("max_custom", [0, 2, 6])
def test_topk_scores_and_ranks(seed, num_logprobs, max_custom):
    def scenario(rng):
        num_rows = 6
        # No masked tokens: for those the kernel counts its own padding into the rank.
        logits = strided(floats(np.round(rng.normal(0, 3, (num_rows, VOCAB)), 1)))
        state = logprob.LogprobTokenIdsState(SLOTS, torch.device("cpu"))
        custom = rng.integers(0, max_custom + 1, SLOTS)
        state.num_token_ids.np[:] = custom
        state.token_ids.gpu.copy_(ints(rng.integers(0, VOCAB, state.token_ids.gpu.shape)))
        state.apply_staged_writes()
        result = logprob.compute_topk_scores(
            logits,
            num_logprobs,
            ints(rng.integers(0, VOCAB, num_rows), torch.int64),
            logprob_token_ids_state=state,
            expanded_idx_mapping=_rows(rng, num_rows),
            max_per_req_token_ids=max_custom,
        )
        return result.logprob_token_ids, result.logprobs, result.selected_token_ranks

    assert_host_matches(scenario, seed, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_prompt_logprob_tokens(seed):
    def scenario(rng):
        num_reqs, model_len = int(rng.integers(1, 7)), 50
        counts = rng.integers(0, 12, num_reqs)
        return prompt_logprob.get_prompt_logprobs_token_ids(
            int(counts.sum()),
            bounds(counts),
            ints(rng.permutation(SLOTS)[:num_reqs], torch.int64),
            ints(rng.integers(0, model_len - 12, SLOTS)),
            strided(ints(rng.integers(0, 999, (SLOTS, model_len)))),
        )

    assert_host_matches(scenario, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nans_are_counted(seed, dtype):
    def scenario(rng):
        logits = _logits(rng, 5, dtype=dtype)
        logits[ints(rng.random(logits.shape) < 0.1, torch.bool)] = float("nan")
        return get_num_nans(logits)

    assert_host_matches(scenario, seed)
