# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU attention with tree masks.

The C++ kernel knows causal masks only. It keeps every ordinary token; tree tokens attend here, in
PyTorch, over the same paged cache. A batch of trees alone never enters the C++ kernel.
"""

from dataclasses import dataclass

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_spechub.attention.visibility import TreeVisibility


@dataclass
class TreeRows:
    """The tree tokens of a batch, gathered once per step and used by every layer."""

    # [num_tree_reqs, max_tree_tokens] token indices; short trees repeat their last one
    tokens: torch.Tensor
    # [num_tree_reqs, num_blocks]
    block_table: torch.Tensor
    # [num_tree_reqs, 1, 1, max_tree_tokens, num_keys] True where a key is hidden
    hidden: torch.Tensor
    # [num_tree_reqs, 1, num_keys, 1] True where a slot holds none of the request's keys
    stale: torch.Tensor
    # no ordinary token is left for the C++ kernel
    whole_batch: bool


@dataclass
class CPUTreeMetadata(CPUAttentionMetadata):
    tree: TreeRows | None = None


class CPUTreeBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type["CPUTreeImpl"]:
        return CPUTreeImpl

    @staticmethod
    def get_builder_cls() -> type["CPUTreeMetadataBuilder"]:
        return CPUTreeMetadataBuilder


def cache_views(
    # [num_blocks, num_kv_heads, block_size, 2 * head_size]
    kv_cache: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value views [num_blocks, block_size, num_kv_heads, head_size] of a layer's cache.

    The C++ kernel stores a block's keys transposed, [head_size, block_size], then its values.
    """
    num_blocks, num_kv_heads, block_size, width = kv_cache.shape
    head_size = width // 2
    halves = kv_cache.view(num_blocks, num_kv_heads, 2, block_size * head_size)
    key = halves[:, :, 0].unflatten(-1, (head_size, block_size)).permute(0, 3, 1, 2)
    value = halves[:, :, 1].unflatten(-1, (block_size, head_size)).permute(0, 2, 1, 3)
    return key, value


def check_cache_layout(isa: str, block_size: int, head_size: int, dtype: torch.dtype) -> None:
    """Write one block through vLLM and read it back through `cache_views`.

    Raises:
        ValueError: this processor's kernel lays its cache out in another way.
    """
    written = torch.randint(-8, 8, (2, block_size, 1, head_size)).to(dtype)
    cache = torch.zeros(1, 1, block_size, 2 * head_size, dtype=dtype)
    key_cache, value_cache = cache.view(1, 1, 2 * block_size, head_size).chunk(2, dim=2)
    slots = torch.arange(block_size)
    ops.cpu_attn_reshape_and_cache(
        *written, key_cache, value_cache, slots, isa, k_scale=1.0, v_scale=1.0
    )
    for stored, expected in zip(cache_views(cache), written, strict=True):
        if not torch.equal(stored[0], expected):
            raise ValueError(
                f"spechub: the CPU attention kernel for {isa!r} lays out its KV cache in an "
                "unknown way; supported: x86-64 with AVX2 or AVX-512"
            )


class CPUTreeMetadataBuilder(CPUAttentionMetadataBuilder):
    accepts_tree = True

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if self.isa == "amx":  # tiles are packed for AMX alone; the vector layout is plain
            self.isa = "vec"
            self._set_isa_to_layers(layer_names)
        check_cache_layout(self.isa, self.block_size, self.head_dim, self.dtype)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        tree: TreeVisibility | None = None,
    ) -> CPUAttentionMetadata:
        rows = None if tree is None else self._tree_rows(common_attn_metadata, tree)
        if rows is None or not rows.whole_batch:
            metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
            if rows is None:
                return metadata
            return CPUTreeMetadata(**vars(metadata), tree=rows)
        common = common_attn_metadata
        return CPUTreeMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
            tree=rows,
        )

    def _tree_rows(self, common: CommonAttentionMetadata, tree: TreeVisibility) -> TreeRows | None:
        counts = tree.num_tree_tokens[: common.num_reqs]
        reqs = np.flatnonzero(counts)
        if len(reqs) == 0:
            return None
        counts = counts[reqs].astype(np.int64)
        first = common.query_start_loc_cpu.numpy()[reqs + 1] - counts
        column = np.minimum(np.arange(counts.max()), (counts - 1)[:, None])
        tokens = torch.from_numpy(first[:, None] + column)

        seq_lens = common.seq_lens.numpy()[reqs]
        num_blocks = -(-int(seq_lens.max()) // self.block_size)
        position = torch.arange(num_blocks * self.block_size)
        until = tree.visible_until[tokens].unsqueeze(-1)
        node = position - until
        bit = (tree.tree_mask[tokens].unsqueeze(-1) >> node.clamp(0, 63)) & 1
        visible = (node < 0) | ((node < 64) & (bit == 1))
        stale = position >= torch.from_numpy(seq_lens).unsqueeze(-1)
        return TreeRows(
            tokens=tokens,
            block_table=common.block_table_tensor[torch.from_numpy(reqs), :num_blocks],
            hidden=~visible[:, None, None],
            stale=stale[:, None, :, None],
            whole_batch=int(counts.sum()) == common.num_actual_tokens,
        )


class CPUTreeImpl(CPUAttentionBackendImpl):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for feature, used in (
            ("sliding-window attention", self.sliding_window != -1),
            ("ALiBi", self.alibi_slopes is not None),
            ("attention sinks", self.sinks is not None),
            (f"kv_cache_dtype={self.kv_cache_dtype!r}", self.is_fp8_kv_cache),
            (f"{self.attn_type} attention", self.attn_type != AttentionType.DECODER),
        ):
            if used:
                raise ValueError(
                    f"spechub: draft trees do not support {feature}; serve this model without "
                    "--speculative-config"
                )

    def forward(
        self,
        layer,
        # [num_tokens, num_heads, head_size]
        query: torch.Tensor,
        # [num_tokens, num_kv_heads, head_size]
        key: torch.Tensor,
        # [num_tokens, num_kv_heads, head_size]
        value: torch.Tensor,
        # [num_blocks, num_kv_heads, block_size, 2 * head_size]
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        # [num_tokens, num_heads, head_size]
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows = getattr(attn_metadata, "tree", None)
        if rows is None or not rows.whole_batch:
            super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        if rows is not None:
            self._attend(query, kv_cache, rows, output)
        return output

    def _attend(
        self,
        # [num_tokens, num_heads, head_size]
        query: torch.Tensor,
        # [num_blocks, num_kv_heads, block_size, 2 * head_size]
        kv_cache: torch.Tensor,
        rows: TreeRows,
        # [num_tokens, num_heads, head_size]
        output: torch.Tensor,
    ) -> None:
        num_reqs, num_rows = rows.tokens.shape
        num_keys = rows.stale.shape[2]
        heads = (self.num_kv_heads, self.num_queries_per_kv)
        block_size, head_size = kv_cache.shape[2], self.head_size
        # [num_reqs, num_blocks, num_kv_heads, 2, block_size * head_size]
        blocks = kv_cache.view(-1, heads[0], 2, block_size * head_size)[rows.block_table]
        # [num_reqs, num_kv_heads, head_size, num_keys]
        keys = (
            blocks[:, :, :, 0]
            .unflatten(-1, (head_size, block_size))
            .permute(0, 2, 3, 1, 4)
            .reshape(num_reqs, heads[0], head_size, num_keys)
        )
        # [num_reqs, num_kv_heads, num_keys, head_size]
        values = (
            blocks[:, :, :, 1]
            .unflatten(-1, (block_size, head_size))
            .permute(0, 2, 1, 3, 4)
            .reshape(num_reqs, heads[0], num_keys, head_size)
            .masked_fill(rows.stale, 0)  # a freed block may hold NaN, and 0 * NaN is NaN
        )
        # [num_reqs, num_kv_heads, num_queries_per_kv * num_rows, head_size]
        queries = query[rows.tokens].unflatten(2, heads).permute(0, 2, 3, 1, 4).flatten(2, 3)
        scores = torch.matmul(queries, keys).float().mul_(self.scale)
        if self.logits_soft_cap:
            scores.div_(self.logits_soft_cap).tanh_().mul_(self.logits_soft_cap)
        scores = scores.unflatten(2, (heads[1], num_rows))
        scores.masked_fill_(rows.hidden, float("-inf"))
        weights = scores.softmax(-1).to(values.dtype).flatten(2, 3)
        # [num_reqs, num_kv_heads, num_queries_per_kv, num_rows, head_size]
        attended = torch.matmul(weights, values).unflatten(2, (heads[1], num_rows))
        output[rows.tokens] = attended.permute(0, 3, 1, 2, 4).flatten(2, 3)
