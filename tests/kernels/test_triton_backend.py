# SPDX-License-Identifier: Apache-2.0
"""The CUSTOM attention backend: real builder, metadata and implementation.

Stand-ins: the engine configuration (the few fields that the builder reads) and the device, so that
`tree_attention` is pointed at the Triton kernel, on the CPU interpreted, and not at the reference.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.devices import DEVICE

pytest.importorskip("vllm")

from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_spechub.attention import triton_backend
from vllm_spechub.attention.triton_backend import TritonTreeBackend, cache_views
from vllm_spechub.attention.visibility import TreeAttnMetadata, TreeVisibility
from vllm_spechub.triton_kernels.tree_attention import CAUSAL, tree_attention_reference
from vllm_spechub.triton_kernels.tree_attention.kernel import tree_attention_triton

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 4, 2, 64, 16
MAX_NUM_TOKENS, MAX_NUM_REQS, NUM_NODES = 64, 8, 14
BINARY = [0b1, 0b11, 0b101, 0b1011, 0b10011, 0b100101, 0b1000101]

# (context length, tree masks) or (context length, number of causal tokens)
MIXED = [(20, BINARY), (33, BINARY[:4]), (0, 9), (40, 1)]


def make_builder():
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            get_num_attention_heads=lambda _: NUM_HEADS,
            get_num_kv_heads=lambda _: NUM_KV_HEADS,
            get_head_size=lambda: HEAD_SIZE,
            rswa_window=None,
        ),
        parallel_config=None,
        compilation_config=SimpleNamespace(
            cudagraph_mode=CUDAGraphMode.FULL,
            cudagraph_capture_sizes=[8, 16],
            static_forward_context={},
        ),
        scheduler_config=SimpleNamespace(
            max_num_batched_tokens=MAX_NUM_TOKENS, max_num_seqs=MAX_NUM_REQS
        ),
        speculative_config=SimpleNamespace(
            num_speculative_tokens=NUM_NODES, parallel_drafting=False
        ),
    )
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE,
        num_kv_heads=NUM_KV_HEADS,
        head_size=HEAD_SIZE,
        dtype=torch.float32,
    )
    return TritonTreeBackend.get_builder_cls()(spec, [], config, torch.device(DEVICE))


def make_impl(**changes):
    arguments = {
        "num_heads": NUM_HEADS,
        "head_size": HEAD_SIZE,
        "scale": HEAD_SIZE**-0.5,
        "num_kv_heads": NUM_KV_HEADS,
        "alibi_slopes": None,
        "sliding_window": None,
        "kv_cache_dtype": "auto",
        **changes,
    }
    return TritonTreeBackend.get_impl_cls()(**arguments)


def make_common(requests, padding: int = 0, padded_reqs: int = 0) -> CommonAttentionMetadata:
    """What the runner hands to `build`; padding as for a FULL graph."""
    lengths = [t if isinstance(t, int) else len(t) for _, t in requests] + [0] * padded_reqs
    contexts = [context for context, _ in requests] + [0] * padded_reqs
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    seq_lens = torch.tensor(lengths).int() + torch.tensor(contexts).int()
    table = torch.arange(len(lengths) * 4, dtype=torch.int32).view(-1, 4)
    return CommonAttentionMetadata(
        query_start_loc=starts.to(DEVICE),
        query_start_loc_cpu=starts,
        seq_lens=seq_lens.to(DEVICE),
        num_reqs=len(lengths),
        num_actual_tokens=sum(lengths) + padding,
        max_query_len=max(lengths),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=table.to(DEVICE),
        slot_mapping=torch.zeros(sum(lengths) + padding, dtype=torch.int64, device=DEVICE),
    )


def make_tree(requests) -> TreeVisibility:
    until, masks, counts = [], [], []
    for context, tokens in requests:
        if isinstance(tokens, int):
            until += range(context + 1, context + tokens + 1)
            masks += [0] * tokens
            counts.append(0)
        else:
            until += [context] * len(tokens)
            masks += tokens
            counts.append(len(tokens))
    return TreeVisibility(
        visible_until=torch.tensor(until, dtype=torch.int32, device=DEVICE),
        tree_mask=torch.tensor(masks, device=DEVICE),
        num_tree_tokens=np.array(counts),
    )


def make_inputs(common, layout: str = "HND"):
    """Query and a cache [num_blocks, num_kv_heads, block_size, 2 * head_size]; spare slots NaN."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(common.num_actual_tokens, NUM_HEADS, HEAD_SIZE, generator=generator)
    num_blocks = common.block_table_tensor.numel()
    shape = (num_blocks, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
    cache = torch.randn(shape, generator=generator)
    if layout == "NHD":
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    for req, seq_len in enumerate(common.seq_lens.tolist()):
        for position in range(seq_len, 4 * BLOCK_SIZE):
            cache[req * 4 + position // BLOCK_SIZE, :, position % BLOCK_SIZE] = float("nan")
    return query.to(DEVICE), cache.to(DEVICE)


def expected_output(common, tree, query, cache) -> torch.Tensor:
    output = torch.zeros_like(query)
    key_cache, value_cache = cache[..., :HEAD_SIZE], cache[..., HEAD_SIZE:]
    tree_attention_reference(
        query,
        key_cache.transpose(1, 2),
        value_cache.transpose(1, 2),
        output,
        common.query_start_loc,
        common.seq_lens,
        common.block_table_tensor,
        tree.visible_until,
        tree.tree_mask,
        HEAD_SIZE**-0.5,
        common.max_query_len,
    )
    return output


def forward(impl, metadata, query, cache) -> torch.Tensor:
    return impl.forward(None, query, query, query, cache, metadata, torch.zeros_like(query))


@pytest.fixture
def launches(monkeypatch):
    """Runs the Triton kernel; lists the arguments of each call."""
    calls = []

    def launch(*args):
        calls.append(args)
        tree_attention_triton(*args, min_tiles=1)

    monkeypatch.setattr(triton_backend, "tree_attention", launch)
    return calls


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_mixed_batch(launches, layout):
    """Tree, truncated tree, prefill and decode, by way of the runner's extra builder arguments."""
    builder, impl = make_builder(), make_impl()
    common, tree = make_common(MIXED), make_tree(MIXED)
    query, cache = make_inputs(common, layout)
    extra = TreeAttnMetadata(tree).get_extra_attn_kwargs(builder, common.num_reqs)
    metadata = builder.build(0, common, **extra)
    output = forward(impl, metadata, query, cache)
    torch.testing.assert_close(output, expected_output(common, tree, query, cache))
    assert len(launches) == 1


def test_captured_graph_replays_other_batches(launches):
    """A graph re-runs the captured launch: same tensors and host values, new device contents."""
    builder, impl = make_builder(), make_impl()
    # Captured with 4 requests of 6 tokens; replayed with 3 requests of 20 in all, and padding.
    captured = make_common([(0, 6)] * 4)
    query, cache = make_inputs(captured)
    metadata = builder.build_for_cudagraph_capture(captured)
    output = torch.zeros_like(query)
    impl.forward(None, query, query, query, cache, metadata, output)
    assert len(launches) == 1

    for requests in (MIXED[:3], [(12, 5), (40, 1), (3, 14)], [(31, BINARY), (0, 12), (5, 1)]):
        common, tree = make_common(requests, padding=4, padded_reqs=1), make_tree(requests)
        has_tree = tree.num_tree_tokens.any()
        # Eager metadata of the same batch refills what the graph reads.
        builder.build(0, common, tree=tree if has_tree else None)
        captured.query_start_loc.copy_(common.query_start_loc)
        captured.seq_lens.copy_(common.seq_lens)
        new_query, new_cache = make_inputs(common)
        query.copy_(new_query)
        cache.copy_(new_cache)
        output.zero_()
        tree_attention_triton(*launches[0])
        torch.testing.assert_close(output, expected_output(common, tree, query, cache))


def test_a_profiling_run_is_vllms(monkeypatch, launches):
    fallbacks = []
    monkeypatch.setattr(TritonAttentionImpl, "forward", lambda *args: fallbacks.append(args))
    query, cache = make_inputs(make_common(MIXED))
    forward(make_impl(), None, query, cache)
    assert [call[6] for call in fallbacks] == [None]
    assert not launches


@pytest.fixture
def flash_calls(monkeypatch):
    """FlashAttention, which needs a GPU, replaced by the reference of causal attention; lists the
    arguments of each call. On a GPU the original computes too."""
    calls = []
    original = getattr(fa_utils, "flash_attn_varlen_func", None)

    def attend(**given):
        calls.append(given)
        if original is not None:
            original(**given)
            return
        num_tokens = len(given["q"])
        causal = torch.full((num_tokens,), CAUSAL, dtype=torch.int32)
        left, right = given["window_size"]
        assert given["causal"]
        assert right == (0 if left >= 0 else -1)
        tree_attention_reference(
            given["q"],
            given["k"],
            given["v"],
            given["out"],
            given["cu_seqlens_q"],
            given["seqused_k"],
            given["block_table"],
            causal,
            torch.zeros(num_tokens, dtype=torch.int64),
            given["softmax_scale"],
            given["max_seqlen_q"],
            given["softcap"],
            left + 1,
        )

    if original is None:
        monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **given: 3)
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", attend, raising=False)
    return calls


@pytest.mark.parametrize(
    ("requests", "first_plain"),
    [
        (MIXED, 2),
        ([(40, 1), (20, BINARY), (0, 9)], 2),  # one without a tree among those with
        ([(0, 30), (33, 1)], 0),
        ([(20, BINARY)], 1),
    ],
)
@pytest.mark.parametrize("window", [None, 12])
def test_requests_without_a_tree_run_flash_attention(
    launches, flash_calls, requests, first_plain, window
):
    """Those after the last tree; each kernel gets its slices, and the whole is as ever."""
    builder, impl = make_builder(), make_impl(sliding_window=window)
    common, tree = make_common(requests, padding=2, padded_reqs=1), make_tree(requests)
    query, cache = (value.half() for value in make_inputs(common))
    has_tree = first_plain > 0
    metadata = builder.build(0, common, tree=tree if has_tree else None)
    output = torch.full_like(query, 7.0)
    for _ in range(2):  # a second layer uses what the first one made
        impl.forward(None, query, query, query, cache, metadata, output)
    used = int(common.query_start_loc[-1])
    before = int(common.query_start_loc[first_plain])
    expected = torch.zeros_like(query)
    key_cache, value_cache = cache_views(cache)
    tree_attention_reference(
        query,
        key_cache,
        value_cache,
        expected,
        common.query_start_loc,
        common.seq_lens,
        common.block_table_tensor,
        tree.visible_until,
        tree.tree_mask,
        HEAD_SIZE**-0.5,
        common.max_query_len,
        window=window or 0,
    )
    torch.testing.assert_close(output[:used], expected[:used], rtol=4e-3, atol=4e-3)
    assert len(launches) == (2 if has_tree else 0)
    assert len(flash_calls) == (2 if before < used else 0)
    if before < used:
        given = flash_calls[0]
        lengths = common.query_start_loc.diff()[first_plain:]
        assert torch.equal(given["cu_seqlens_q"].diff(), lengths)
        assert given["cu_seqlens_q"][0] == 0
        assert given["max_seqlen_q"] == lengths.max()
        assert torch.equal(given["seqused_k"], common.seq_lens[first_plain:])
        assert given["max_seqlen_k"] == common.max_seq_len
        assert given["fa_version"] in (2, 3, 4)
        assert given["cu_seqlens_q"] is flash_calls[1]["cu_seqlens_q"]
    if has_tree and before < used:
        assert len(launches[0][0]) == before
        assert len(launches[0][5]) == first_plain


def test_a_captured_graph_never_runs_flash_attention(launches, flash_calls):
    """A replay may have trees where the capture had none."""
    builder, impl = make_builder(), make_impl()
    common = make_common([(0, 6)] * 2)
    query, cache = (value.half() for value in make_inputs(common))
    metadata = builder.build_for_cudagraph_capture(common)
    impl.forward(None, query, query, query, cache, metadata, torch.zeros_like(query))
    assert len(launches) == 1
    assert not flash_calls


@pytest.mark.parametrize("change", [{"kv_cache_dtype": "fp8"}, {"head_size": 36}])
def test_what_flash_attention_cannot_read_is_ours(monkeypatch, flash_calls, change):
    monkeypatch.setattr(current_platform, "fp8_dtype", lambda: torch.float8_e4m3fn)
    assert make_impl().flash_version
    assert make_impl(**change).flash_version is None


def test_buffers_start_causal_and_keep_their_place():
    builder = make_builder()
    assert len(builder.visible_until) == MAX_NUM_TOKENS  # no pass is wider
    assert (builder.visible_until == CAUSAL).all()
    common, tree = make_common(MIXED), make_tree(MIXED)
    captured = builder.build_for_cudagraph_capture(make_common(MIXED))
    metadata = builder.build(0, common, tree=tree)
    assert metadata.visible_until.data_ptr() == captured.visible_until.data_ptr()
    assert metadata.tree_mask.data_ptr() == captured.tree_mask.data_ptr()
    builder.build(0, common)
    assert (builder.visible_until == CAUSAL).all()


def test_too_many_tokens():
    builder = make_builder()
    with pytest.raises(ValueError, match="exceed"):
        builder.build(0, make_common([(0, 60)], padding=100))


def test_declarations():
    builder = make_builder()
    assert TritonTreeBackend.get_name() == "CUSTOM"
    assert builder.get_cudagraph_support(None, None) == AttentionCGSupport.ALWAYS
    assert not builder.supports_draft_decode_metadata_update
    assert not make_impl().fused_output_quant_supported(None)
    for refused in ("mm_prefix", "rswa", "non_causal", "batch_invariance"):
        assert not getattr(TritonTreeBackend, f"supports_{refused}")()


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        ({"alibi_slopes": [0.5] * NUM_HEADS}, "ALiBi"),
        ({"chunk_lookback": 1}, "chunked attention"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "kv_cache_dtype='int8_per_token_head'"),
        ({"attn_type": AttentionType.ENCODER_DECODER}, "encoder_decoder attention"),
    ],
)
def test_unsupported_features_are_refused(change, feature):
    with pytest.raises(ValueError, match=rf"^spechub: .* {feature}; [^\n]*$"):
        make_impl(**change)


def test_softcap_window_and_sinks_reach_the_kernel(launches):
    common, tree = make_common(MIXED), make_tree(MIXED)
    query, cache = make_inputs(common)
    metadata = make_builder().build(0, common, tree=tree)
    sinks = torch.zeros(NUM_HEADS, device=DEVICE)
    impl = make_impl(logits_soft_cap=30.0, sliding_window=8, sinks=sinks)
    forward(impl, metadata, query, cache)
    assert launches[0][-5:-1] == (30.0, 8, None, None)
    assert launches[0][-1] is sinks


def test_an_fp8_cache_is_read_with_the_layers_scales(launches, monkeypatch):
    monkeypatch.setattr(current_platform, "fp8_dtype", lambda: torch.float8_e4m3fn)
    common, tree = make_common(MIXED), make_tree(MIXED)
    query, cache = make_inputs(common)
    metadata = make_builder().build(0, common, tree=tree)
    impl = make_impl(kv_cache_dtype="fp8")
    scales = torch.tensor([[0.5], [2.0]], device=DEVICE)
    layer = SimpleNamespace(_k_scale=scales[0], _v_scale=scales[1])
    stored = cache.to(torch.float8_e4m3fn)
    output = torch.zeros_like(query)
    impl.forward(layer, query, query, query, stored.view(torch.uint8), metadata, output)
    assert launches[0][-3:] == (layer._k_scale, layer._v_scale, None)
    read = stored.float()
    read[..., :HEAD_SIZE] *= 0.5
    read[..., HEAD_SIZE:] *= 2.0
    torch.testing.assert_close(output, expected_output(common, tree, query, read))


def test_cache_views_split_keys_from_values():
    cache = torch.arange(2 * 3 * 16 * 8).view(2, 3, 16, 8)
    key_cache, value_cache = cache_views(cache)
    assert key_cache.shape == value_cache.shape == (2, 16, 3, 4)
    assert torch.equal(key_cache[1, 5, 2], cache[1, 2, 5, :4])
    assert torch.equal(value_cache[1, 5, 2], cache[1, 2, 5, 4:])
    assert key_cache.data_ptr() == cache.data_ptr()
