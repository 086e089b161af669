# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu import block_table, buffer_utils, input_batch
from vllm.v1.worker.gpu.mm import rope

from helpers.interpreted import assert_host_matches, bounds, ints, strided
from vllm_spechub.integration.versions import running

SLOTS = 9
"""Request slots, most of them not in the batch."""
MODEL_LEN = 70
SEEDS = [0, 1, 2, 3]
new_in_0_33 = pytest.mark.skipif(running() == "0.32.0", reason="new in vLLM 0.33")


def _slots(rng: np.random.Generator, num_reqs: int) -> torch.Tensor:
    return ints(rng.permutation(SLOTS)[:num_reqs], torch.int64)


def _block_tables(rng: np.random.Generator, sizes: list[int], **options) -> block_table.BlockTables:
    tables = block_table.BlockTables(
        block_sizes=sizes,
        max_num_reqs=SLOTS,
        max_num_batched_tokens=61,
        max_num_blocks_per_group=[-(-MODEL_LEN // size) for size in sizes],
        device=torch.device("cpu"),
        **options,
    )
    for slot in range(SLOTS):
        new = tuple(
            rng.integers(0, 1000, rng.integers(1, -(-MODEL_LEN // size) + 1)).tolist()
            for size in sizes
        )
        tables.append_block_ids(slot, new, overwrite=True)
    tables.apply_staged_writes()
    return tables


@new_in_0_33
@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_before_sliding_windows_are_cleared(seed):
    def scenario(rng):
        tables = _block_tables(rng, [4, 16, 7, 4], sliding_window_reach=[9, 0, 3, 31])
        computed = ints(rng.integers(MODEL_LEN // 2, MODEL_LEN, SLOTS))
        batch = _slots(rng, int(rng.integers(1, SLOTS)))
        return tables.gather_block_tables(batch, SLOTS, num_computed_tokens=computed)

    assert_host_matches(scenario, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sizes", [[16], [4, 16, 7]])
def test_block_tables_are_written_and_gathered(seed, sizes):
    def scenario(rng):
        tables = _block_tables(rng, sizes)
        for table in tables.input_block_tables:
            table.copy_(ints(rng.integers(-9, 0, table.shape)))
        # Later blocks of some requests, in one staged write per group.
        for slot in rng.permutation(SLOTS)[:4].tolist():
            room = [
                table.gpu.shape[1] - int(tables.num_blocks.np[group, slot])
                for group, table in enumerate(tables.block_tables)
            ]
            tables.append_block_ids(slot, tuple(list(range(min(n, 2))) for n in room), False)
        tables.apply_staged_writes()
        # The host kernel zeroes every row past the batch, so pad to the last one.
        gathered = tables.gather_block_tables(_slots(rng, int(rng.integers(1, SLOTS))), SLOTS)
        return [table.gpu for table in tables.block_tables], list(gathered)

    assert_host_matches(scenario, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cp", [(1, 0, 1), (2, 1, 1), (4, 2, 3)])
def test_slot_mappings(seed, cp):
    cp_size, cp_rank, cp_interleave = cp

    def scenario(rng):
        tables = _block_tables(
            rng,
            [12, 6, 24],
            cp_size=cp_size,
            cp_rank=cp_rank,
            cp_interleave=cp_interleave,
            slot_mapping_enabled=[True, False, True],
            dcp_sharded=[True, True, False],
        )
        for table in tables.block_tables:
            table.gpu.copy_(ints(rng.integers(0, 1000, table.gpu.shape)))
        tables.slot_mappings.fill_(-77)
        num_reqs = int(rng.integers(1, 7))
        idx_mapping = _slots(rng, num_reqs)
        idx_mapping[ints(rng.random(num_reqs) < 0.3, torch.bool)] = -1
        counts = rng.integers(0, 10, num_reqs)
        positions = ints(rng.integers(0, MODEL_LEN, counts.sum()), torch.int64)
        tables.compute_slot_mappings(idx_mapping, bounds(counts), positions, int(counts.sum()))
        return tables.slot_mappings

    assert_host_matches(scenario, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
def test_staged_writes(seed, dtype):
    def scenario(rng):
        device = torch.device("cpu")
        rows = buffer_utils.StagedWriteTensor((SLOTS, MODEL_LEN), dtype, device)
        cells = buffer_utils.StagedWriteTensor(SLOTS, dtype, device)
        rows.gpu = strided(rows.gpu)
        for slot in rng.permutation(SLOTS)[:5].tolist():
            begin = int(rng.integers(0, MODEL_LEN - 20))
            rows.stage_write(slot, begin, rng.integers(1, 99, rng.integers(1, 20)).tolist())
            cells.stage_write_elem(slot, int(rng.integers(1, 99)))
        rows.apply_write()
        cells.apply_write()
        return rows.gpu, cells.gpu

    assert_host_matches(scenario, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_lookahead", [1, 3])
def test_prefill_inputs(seed, num_lookahead):
    def scenario(rng):
        num_reqs = int(rng.integers(1, 7))
        counts = rng.integers(0, 12, num_reqs)
        prefill_len = rng.integers(1, 40, SLOTS)
        # Among them requests past their prompt, and chunks that end it or stop just before.
        computed = np.maximum(prefill_len - rng.integers(-3, 16, SLOTS), 0)
        input_ids = torch.empty(int(counts.sum()) + 2, dtype=torch.int32)
        lookahead = strided(torch.empty(num_lookahead, SLOTS, dtype=torch.int32))
        input_batch.prepare_prefill_inputs(
            input_ids,
            lookahead,
            _slots(rng, num_reqs),
            bounds(counts),
            strided(ints(rng.integers(0, 999, (SLOTS, MODEL_LEN)))),
            ints(prefill_len),
            ints(computed),
        )
        return input_ids, lookahead

    assert_host_matches(scenario, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_positions_and_sequence_lengths(seed):
    def scenario(rng):
        num_reqs = int(rng.integers(1, 7))
        counts = rng.integers(0, 12, num_reqs)
        positions = torch.empty(int(counts.sum()) + 2, dtype=torch.int64)
        seq_lens = torch.empty(SLOTS + 1, dtype=torch.int32)
        computed = ints(rng.integers(0, 99, SLOTS))
        idx_mapping = _slots(rng, num_reqs)
        # Padded past the batch, as for a graph.
        starts = torch.cat([bounds(counts), ints([counts.sum()] * 2)])
        input_batch.prepare_pos_seq_lens(idx_mapping, starts, computed, positions, seq_lens)
        before = computed.clone()
        input_batch.post_update_num_computed_tokens(idx_mapping, computed, starts)
        return positions, seq_lens, before, computed

    assert_host_matches(scenario, seed)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("num_new", [0, 1])
def test_sampled_and_draft_tokens_are_combined(seed, num_new):
    def scenario(rng):
        num_reqs, num_steps = int(rng.integers(1, 7)), 5
        num_logits = rng.integers(max(num_new, 1), num_steps + num_new + 1, num_reqs)
        query = num_logits + rng.integers(0, 3, num_reqs)
        idx_mapping = _slots(rng, num_reqs)
        seq_lens = rng.integers(12, 30, num_reqs)
        # In, at the end of, around and past the prompt.
        prefill_len = rng.integers(1, 9, SLOTS)
        prefill_len[idx_mapping.numpy()] = seq_lens + rng.choice([-8, -2, -1, 0, 2], num_reqs)
        input_ids = ints(rng.integers(0, 999, query.sum()))
        indices = input_batch.combine_sampled_and_draft_tokens(
            input_ids,
            idx_mapping,
            ints(rng.integers(0, 999, (SLOTS, 1)), torch.int64),
            bounds(query),
            ints(seq_lens),
            ints(prefill_len),
            strided(ints(rng.integers(0, 999, (SLOTS, num_steps)), torch.int64)),
            bounds(num_logits),
            int(num_logits.sum()) + 1,
            num_new,
        )
        return input_ids, indices

    assert_host_matches(scenario, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_sampled_and_rejected_are_counted(seed):
    def scenario(rng):
        num_reqs = int(rng.integers(1, 7))
        num_logits = rng.integers(1, 8, num_reqs)
        num_sampled = ints(rng.integers(1, num_logits + 1))
        return num_sampled, input_batch.get_num_sampled_and_rejected(
            num_sampled,
            ints(rng.integers(8, 12, num_reqs)),
            bounds(num_logits),
            _slots(rng, num_reqs),
            ints(rng.integers(8, 12, SLOTS)),
        )

    assert_host_matches(scenario, seed)


@new_in_0_33
@pytest.mark.parametrize("seed", SEEDS)
def test_drafts_of_another_rank_are_taken_over(seed):
    def scenario(rng):
        num_reqs, num_drafts = int(rng.integers(1, 7)), 3
        idx_mapping = _slots(rng, num_reqs)
        idx_mapping[ints(rng.random(num_reqs) < 0.3, torch.bool)] = -1
        taken_over = ints(rng.integers(0, 50, (SLOTS, num_drafts)), torch.int64)
        input_batch.post_update(
            idx_mapping,
            ints(rng.integers(0, 50, SLOTS)),
            ints(rng.integers(0, 50, (SLOTS, 1)), torch.int64),
            None,
            ints(rng.integers(0, 50, (num_reqs, 1 + num_drafts)), torch.int64),
            ints(rng.integers(0, 2 + num_drafts, num_reqs)),
            ints(rng.integers(0, 4, num_reqs)),
            None,
            ints(rng.integers(0, 50, (SLOTS, MODEL_LEN))),
            ints(rng.integers(1, MODEL_LEN - 1 - num_drafts, SLOTS)),
            ints(rng.integers(50, 99, (num_reqs, num_drafts)), torch.int64),
            taken_over,
        )
        return taken_over

    assert_host_matches(scenario, seed)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("with_counts", [False, True])
@pytest.mark.parametrize("with_queries", [False, True])
def test_state_after_a_step(seed, with_counts, with_queries):
    def scenario(rng):
        num_reqs, width, vocab_size = int(rng.integers(1, 7)), 6, 5
        idx_mapping = _slots(rng, num_reqs)
        idx_mapping[ints(rng.random(num_reqs) < 0.3, torch.bool)] = -1
        state = {
            "computed": ints(rng.integers(0, 50, SLOTS)),
            "last": ints(rng.integers(0, 50, (SLOTS, 1)), torch.int64),
            "counts": strided(ints(rng.integers(0, 3, (SLOTS, vocab_size)))),
            "tokens": strided(ints(rng.integers(0, 50, (SLOTS, MODEL_LEN)))),
            "lens": ints(rng.integers(1, MODEL_LEN - width, SLOTS)),
        }
        input_batch.post_update(
            idx_mapping,
            state["computed"],
            state["last"],
            state["counts"] if with_counts else None,
            strided(ints(rng.integers(0, vocab_size, (num_reqs, width)), torch.int64)),
            ints(rng.integers(0, width + 1, num_reqs)),
            ints(rng.integers(0, 4, num_reqs)),
            bounds(rng.integers(1, 9, num_reqs)) if with_queries else None,
            state["tokens"],
            state["lens"],
        )
        return state

    assert_host_matches(scenario, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_requests_expand_to_logits(seed):
    def scenario(rng):
        num_reqs = int(rng.integers(1, 7))
        counts = rng.integers(0, 8, num_reqs)
        return input_batch.expand_idx_mapping(
            _slots(rng, num_reqs), int(counts.sum()) + 2, bounds(counts), 7
        )

    assert_host_matches(scenario, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_rope_positions(seed):
    """Of prompts in one piece and in chunks, and of what is decoded after them."""

    def scenario(rng):
        dims = int(rng.integers(3, 5))
        state = rope.RopeState(dims, SLOTS, 61, MODEL_LEN, torch.device("cpu"))
        lengths = rng.integers(10, MODEL_LEN - 20, SLOTS)
        for slot, length in enumerate(lengths.tolist()):
            for dim in range(dims):
                row = rng.integers(0, 99, length).tolist()
                state.prefill_positions.stage_write(dims * slot + dim, 0, row)
            state.prefill_delta.np[slot] = rng.integers(-9, 9)
        state.apply_staged_writes()
        state.positions.fill_(-77)
        idx_mapping = _slots(rng, int(rng.integers(1, 7)))
        chunks = rng.integers(1, 8, len(idx_mapping))
        prompts = rng.random(SLOTS) < 0.5
        computed = np.where(
            prompts, rng.integers(0, lengths - 8), lengths + rng.integers(0, 10, SLOTS)
        )
        state.prepare_positions(idx_mapping, bounds(chunks), ints(lengths), ints(computed))
        return state.get_positions(61)

    assert_host_matches(scenario, seed)
