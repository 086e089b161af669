# SPDX-License-Identifier: Apache-2.0
"""What the default on CUDA adds to the memory, computed as engines size their buffers."""

import memory_tables as memory
import pytest

from vllm_spechub.config import DEFAULT_SCHEDULE_ON_CUDA


@pytest.mark.parametrize("engine", memory.ENGINES)
def test_the_default_adds_a_twentieth_at_most(engine):
    draft, _, kept = memory.added_bytes(DEFAULT_SCHEDULE_ON_CUDA, *memory.ENGINES[engine])
    # a row more than the schedule says for each tree: 9 requests with 7 nodes that have children,
    # 21 with 3 and 129 with 2, in bf16
    rows = (9 * 7 + 21 * 3 + 129 * 2) * memory.VOCAB_SIZE * 2
    assert rows <= draft < 1.001 * rows
    assert draft + kept <= memory.GPU_BYTES / 20


def test_a_tree_for_every_request_of_a_server_adds_a_twentieth_at_most():
    draft, _, kept = memory.added_bytes(((1, None, "binary:3"),), *memory.ENGINES["`vllm serve`"])
    assert draft + kept <= memory.GPU_BYTES / 20
