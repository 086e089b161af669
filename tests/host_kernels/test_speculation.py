# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from interpreted import assert_host_matches, bounds, ints, strided
from vllm.v1.worker.gpu.spec_decode import rejection_sampler
from vllm.v1.worker.gpu.spec_decode.standalone_ar import speculator

SLOTS = 9
SEEDS = range(6)


def _slots(rng: np.random.Generator, num_reqs: int) -> torch.Tensor:
    return ints(rng.permutation(SLOTS)[:num_reqs], torch.int64)


@pytest.mark.parametrize("seed", SEEDS)
def test_sampled_tokens_are_flattened(seed):
    def scenario(rng):
        num_reqs, width = int(rng.integers(1, 7)), 5
        counts = rng.integers(1, width + 1, num_reqs)
        flat = torch.empty(int(counts.sum()), dtype=torch.int64)
        sampled = strided(ints(rng.integers(0, 99, (num_reqs, width)), torch.int64))
        # As vLLM's own caller does; no function of its own wraps this kernel.
        rejection_sampler._flatten_sampled_kernel[(num_reqs,)](
            flat,
            sampled,
            sampled.stride(0),
            ints(rng.integers(0, counts + 1)),
            bounds(counts),
            num_warps=1,
        )
        return flat

    assert_host_matches(scenario, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_drafts_are_gathered(seed):
    def scenario(rng):
        num_tokens, num_logits = 30, int(rng.integers(1, 25))
        return rejection_sampler.gather_draft_sampled(
            ints(rng.integers(0, 999, num_tokens)),
            ints(rng.integers(0, 40, num_tokens), torch.int64),
            ints(rng.integers(0, num_tokens, num_logits), torch.int64),
            ints(rng.integers(0, SLOTS, num_logits), torch.int64),
            ints(rng.integers(0, 5, num_logits)),
            ints(rng.integers(0, 40, SLOTS)),
        )

    assert_host_matches(scenario, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_standalone_prefill_inputs(seed):
    def scenario(rng):
        num_reqs, max_model_len = int(rng.integers(1, 7)), 45
        counts = rng.integers(1, 9, num_reqs)
        num_tokens = int(counts.sum())
        starts = bounds(counts)
        batch = SimpleNamespace(
            num_reqs=num_reqs,
            num_tokens=num_tokens,
            query_start_loc=starts,
            query_start_loc_np=starts.numpy(),
            input_ids=ints(rng.integers(1, 999, num_tokens)),
            # Some run into the end of the context.
            positions=ints(rng.integers(0, max_model_len, num_tokens), torch.int64),
            idx_mapping=_slots(rng, num_reqs),
            seq_lens=ints(rng.integers(9, max_model_len + 1, num_reqs)),
        )
        buffers = SimpleNamespace(
            query_start_loc=torch.empty(SLOTS + 1, dtype=torch.int32),
            seq_lens=torch.empty(SLOTS, dtype=torch.int32),
        )
        out_ids = torch.empty(num_tokens + SLOTS, dtype=torch.int32)
        out_positions = torch.empty(num_tokens + SLOTS, dtype=torch.int64)
        last_indices = torch.empty(SLOTS, dtype=torch.int64)
        total = speculator.prepare_prefill_inputs(
            buffers,
            batch,
            ints(rng.integers(1, 999, (SLOTS, 1)), torch.int64),
            ints(rng.integers(0, counts)),
            out_ids,
            out_positions,
            last_indices,
            SLOTS,
            max_model_len,
        )
        return total, out_ids, out_positions, last_indices, vars(buffers)

    assert_host_matches(scenario, seed)
