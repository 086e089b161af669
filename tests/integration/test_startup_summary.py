# SPDX-License-Identifier: Apache-2.0
"""What is said at the start: the tree as text, and whose share of a block the draft takes."""

from types import SimpleNamespace

import torch

from vllm_spechub.config import SpecHubConfig
from vllm_spechub.integration.memory import kv_cache_share, verification_bytes
from vllm_spechub.targets.base import parse_target
from vllm_spechub.trees.drawing import draw
from vllm_spechub.trees.schedule import TreeSchedule
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


def test_bytes_to_verify():
    """The rows that the schedule lets a step have: logits in bf16, a part of them in fp32 with its
    copy, and the hidden states of the step."""

    def size(budget, *ranges, max_num_seqs=1024, target=None):
        scheduler = SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
        model = SimpleNamespace(
            dtype=torch.bfloat16, get_vocab_size=lambda: 128256, get_hidden_size=lambda: 4096
        )
        spec = object.__new__(SpecHubConfig)
        spec.schedule = TreeSchedule.parse(ranges, "traversal")
        spec.target_distribution = target
        hidden = budget * 4096 * 2
        config = SimpleNamespace(
            scheduler_config=scheduler, model_config=model, speculative_config=spec
        )
        return verification_bytes(config) - hidden

    in_fp32 = 2**28 // (128256 * 4)
    assert size(16384, (1, None, "binary:3")) == 128256 * (1024 * 15 * 2 + in_fp32 * 6)
    assert size(8192, (1, None, "binary:3")) == 128256 * (8192 * 2 + in_fp32 * 6)
    assert size(8192, (1, None, "binary:3"), max_num_seqs=8) == 128256 * 120 * 8
    assert (
        size(8192, (1, 8, "binary:3"), (9, 100, "chain:2"), (101, None, None)) == 128256 * 300 * 8
    )
    # a combined target: the other member's logits, of 1024 requests without trees, and fp32 rows
    mixture = parse_target({"type": "mixture", "weight": 0.5})
    ranges = (1, 8, "binary:3"), (9, None, None)
    more = size(8192, *ranges, target=mixture) - size(8192, *ranges)
    assert more == 128256 * 1024 * (2 + 2 + 12)
    members = [{"model": name, "weight": 0.2} for name in ("one", "two")]
    three = parse_target({"type": "mixture", "weight": 0.5, "members": members})
    more = size(8192, *ranges, target=three) - size(8192, *ranges)
    assert more == 128256 * 1024 * (3 * (2 + 2) + 20)
