# SPDX-License-Identifier: Apache-2.0
"""What is said at the start: the tree as text, and whose share of a block the draft takes."""

from types import SimpleNamespace

import torch

from vllm_spechub.config import SpecHubConfig
from vllm_spechub.integration.memory import kv_cache_share, verification_bytes
from vllm_spechub.integration.startup_summary import draw
from vllm_spechub.trees.tree import TokenTree


def test_a_tree_is_drawn_in_slot_order():
    assert draw(TokenTree((0, 0, 1, 1, 2, 3))).splitlines() == [
        "0",
        "├─ 1",
        "│  ├─ 3",
        "│  │  └─ 6",
        "│  └─ 4",
        "└─ 2",
        "   └─ 5",
    ]


def test_the_drafts_share_of_a_block():
    def group(size, *names):
        spec = SimpleNamespace(page_size_bytes=size)
        return SimpleNamespace(kv_cache_spec=spec, layer_names=names)

    config = SimpleNamespace(kv_cache_groups=[group(30, "t0", "t1", "d0"), group(10, "d1")])
    assert kv_cache_share(config, {"d0", "d1"}) == 0.4
    # a layer that uses another's cache takes nothing
    assert kv_cache_share(config, {"d0", "d1"}, sharing=["t1", "d1"]) == 0.5


def test_rows_to_verify():
    """15 rows instead of one for each of 256 requests, bf16 and fp32, unless the budget is less."""

    def size(budget):
        scheduler = SimpleNamespace(max_num_seqs=256, max_num_batched_tokens=budget)
        model = SimpleNamespace(dtype=torch.bfloat16, get_vocab_size=lambda: 128256)
        spec = object.__new__(SpecHubConfig)
        spec.num_speculative_tokens = 14
        return verification_bytes(
            SimpleNamespace(scheduler_config=scheduler, model_config=model, speculative_config=spec)
        )

    assert size(8192) == 256 * 14 * 128256 * 6
    assert size(1000) == (1000 - 256) * 128256 * 6
    assert size(200) == 0
