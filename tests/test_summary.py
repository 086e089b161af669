# SPDX-License-Identifier: Apache-2.0
"""What is said at the start: the tree as text, and whose share of a block the draft takes."""

from types import SimpleNamespace

from vllm_spechub.summary import draw, kv_cache_share
from vllm_spechub.topology import TokenTree


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
