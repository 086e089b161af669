# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU attention with tree masks.

vLLM's C++ kernel has causal masks only. It still handles every ordinary token; tree tokens attend
in our Numba kernel, over the same paged cache. A batch that consists of trees skips the C++ kernel,
and on one thread so do short chains, because calling it costs more than their arithmetic.
"""

from dataclasses import dataclass
from typing import Any

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
from vllm_spechub.cpu.tree_kernels.attention import attend_trees, store_and_attend

MAX_CHAIN = 16
"""The most tokens of a request that attend as a tree without branches instead."""


@dataclass
class TreeRows:
    """The tree tokens of a batch, as our Numba kernel takes them."""

    # [num_tree_reqs, num_blocks] int32
    block_table: np.ndarray
    # [num_tree_reqs] int32
    seq_lens: np.ndarray
    # [num_tree_reqs] int64 each
    first_token: np.ndarray
    num_tree_tokens: np.ndarray
    # [num_tokens] int32 and int64
    visible_until: np.ndarray
    tree_mask: np.ndarray
    # whether no ordinary token is left for the C++ kernel
    whole_batch: bool


@dataclass
class CPUTreeMetadata(CPUAttentionMetadata):
    """vLLM's metadata, and the tree tokens of the batch, if it has any."""

    tree: TreeRows | None = None


class CPUTreeBackend(CPUAttentionBackend):
    """vLLM's CPU backend with tree masks."""

    # `forward` stores keys and values itself: a separate operation for each layer would take longer
    # than the copy that it makes.
    forward_includes_kv_cache_update = True

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


def host_views(
    # [num_blocks, num_kv_heads, block_size, 2 * head_size] float32
    kv_cache: torch.Tensor,
    head_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """A layer's cache as `attend_trees` takes it: twice the same memory, in the layout of keys and
    in that of values.

    Returns:
        [num_blocks, num_kv_heads, 2, head_size, block_size], whose `[:, :, 0]` are the keys, and
        [num_blocks, num_kv_heads, 2, block_size, head_size], whose `[:, :, 1]` are the values.
    """
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    halves = kv_cache.view(num_blocks, num_kv_heads, 2, -1)
    shapes = (head_size, block_size), (block_size, head_size)
    keys, values = (halves.unflatten(-1, shape).numpy() for shape in shapes)
    return keys, values


FP8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""The dtype in which a quantised cache's bytes are read, by `kv_cache_dtype`."""


def check_cache_layout(
    isa: str, block_size: int, head_size: int, dtype: torch.dtype, kv_cache_dtype: str
) -> None:
    """Check that vLLM's kernel has the cache layout that we assume: write one block through vLLM,
    and read it back through `cache_views`.

    Raises:
        ValueError: the kernel for this processor has another layout.
    """
    stored_dtype = FP8.get(kv_cache_dtype, dtype)
    key, value = torch.randint(-4, 5, (2, block_size, 1, head_size)).to(dtype)
    cache = torch.zeros(1, 1, block_size, 2 * head_size).to(stored_dtype)
    if stored_dtype != dtype:
        cache = cache.view(torch.uint8)
    key_cache, value_cache = cache.view(1, 1, 2 * block_size, head_size).chunk(2, dim=2)
    slots = torch.arange(block_size)
    ops.cpu_attn_reshape_and_cache(
        key, value, key_cache, value_cache, slots, isa, 1.0, 1.0, kv_cache_dtype
    )
    for stored, expected in zip(cache_views(cache.view(stored_dtype)), (key, value), strict=True):
        if not torch.equal(stored[0].to(dtype), expected):
            raise ValueError(
                f"spechub: the CPU attention kernel for {isa!r} has an unknown KV cache "
                "layout; supported: x86-64 with AVX2 or AVX-512"
            )


class CPUTreeMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds metadata with the tree tokens of a batch, or with its short chains as trees."""

    accepts_tree = True

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if self.isa == "amx":  # AMX packs keys into tiles, which only it reads
            self.isa = "vec"
            self._set_isa_to_layers(layer_names)
        check_cache_layout(
            self.isa, self.block_size, self.head_dim, self.dtype, self.kv_cache_dtype
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        tree: TreeVisibility | None = None,
    ) -> CPUAttentionMetadata:
        if tree is None:
            rows = self._chain_rows(common_attn_metadata)
        else:
            rows = self._tree_rows(common_attn_metadata, tree)
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
        return self._rows(
            common,
            tree.num_tree_tokens[: common.num_reqs],
            tree.visible_until.numpy(),
            tree.tree_mask.numpy(),
        )

    def _chain_rows(self, common: CommonAttentionMetadata) -> TreeRows | None:
        """Short chains as trees whose roots are the chains' first tokens; None where the C++ kernel
        is faster or needed."""
        # vLLM's kernel shares its work among threads, ours does not.
        if not (1 < common.max_query_len <= MAX_CHAIN and common.causal):
            return None
        if torch.get_num_threads() > 1:
            return None
        starts = common.query_start_loc_cpu.numpy()[: common.num_reqs + 1]
        counts = np.diff(starts)
        roots = common.seq_lens.numpy()[: common.num_reqs] - counts
        depths = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
        return self._rows(
            common,
            counts.astype(np.int64),
            np.repeat(roots, counts).astype(np.int32),
            np.int64(2) ** (depths + 1) - 1,
        )

    def _rows(
        self,
        common: CommonAttentionMetadata,
        # [num_reqs]
        counts: np.ndarray,
        # [num_tokens]
        visible_until: np.ndarray,
        # [num_tokens]
        tree_mask: np.ndarray,
    ) -> TreeRows | None:
        """The last `counts` tokens of every request as tree tokens; None if there are none."""
        reqs = np.flatnonzero(counts)
        if len(reqs) == 0:
            return None
        counts = counts[reqs]
        seq_lens = common.seq_lens.numpy()[reqs]
        num_blocks = -(-int(seq_lens.max()) // self.block_size)
        return TreeRows(
            block_table=common.block_table_tensor.numpy()[reqs, :num_blocks],
            seq_lens=seq_lens,
            first_token=common.query_start_loc_cpu.numpy()[reqs + 1] - counts,
            num_tree_tokens=counts,
            visible_until=visible_until,
            tree_mask=tree_mask,
            whole_batch=int(counts.sum()) == common.num_actual_tokens,
        )


class CPUTreeImpl(CPUAttentionBackendImpl):
    """vLLM's CPU attention of one layer, with tree masks.

    Raises:
        ValueError: on construction, for a layer with a feature that the kernel lacks.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # the layer's cache, and its `host_views`
        self._viewed: torch.Tensor | None = None
        self._views: tuple[np.ndarray, np.ndarray]
        self._no_sinks = np.full(self.num_heads, -np.inf, np.float32)
        for feature, used in (
            ("ALiBi", self.alibi_slopes is not None),
            (f"{self.attn_type!s} attention", self.attn_type != AttentionType.DECODER),
        ):
            if used:
                raise ValueError(
                    f"spechub: draft trees do not support {feature}; serve this model without "
                    "--speculative-config"
                )

    def forward(
        self,
        layer: Any,
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
        if attn_metadata is None:  # a profiling run
            return output
        rows: TreeRows | None = getattr(attn_metadata, "tree", None)
        whole = rows if rows is not None and rows.whole_batch else None
        stores = self.kv_sharing_target_layer_name is None
        if whole is not None and stores and kv_cache.dtype == query.dtype == torch.float32:
            if self._viewed is not kv_cache:
                self._viewed, self._views = kv_cache, host_views(kv_cache, self.head_size)
            store_and_attend(
                key.contiguous().numpy(),
                value.contiguous().numpy(),
                attn_metadata.slot_mapping.numpy(),
                query.contiguous().numpy(),
                *self._views,
                *self._tree_arguments(whole, whole.block_table),
                output.numpy(),
            )
            return output
        if stores:
            slots = attn_metadata.slot_mapping
            self.do_kv_cache_update(layer, key, value, kv_cache, slots)
        if whole is None:
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
            self._attend(layer, query, kv_cache, rows, output)
        return output

    def _tree_arguments(
        self,
        rows: TreeRows,
        # [num_tree_reqs, num_blocks] int32
        block_table: np.ndarray,
    ) -> tuple[
        np.ndarray,
        np.ndarray,
        np.ndarray,
        np.ndarray,
        np.ndarray,
        np.ndarray,
        np.float32,
        np.float32,
        int,
        np.ndarray,
    ]:
        """The arguments of `attend_trees` between the cache and the output."""
        return (
            block_table,
            rows.seq_lens,
            rows.first_token,
            rows.num_tree_tokens,
            rows.visible_until,
            rows.tree_mask,
            np.float32(self.scale),
            np.float32(self.logits_soft_cap),
            max(self.sliding_window, 0),
            # read anew each time, because weights may be loaded or cast at any time
            self._no_sinks if self.sinks is None else self.sinks.detach().float().numpy(),
        )

    def _attend(
        self,
        layer: Any,
        # [num_tokens, num_heads, head_size]
        query: torch.Tensor,
        # [num_blocks, num_kv_heads, block_size, 2 * head_size]
        kv_cache: torch.Tensor,
        rows: TreeRows,
        # [num_tokens, num_heads, head_size]
        output: torch.Tensor,
    ) -> None:
        """Write the attention of the tree tokens into `output`."""
        cache, block_table, attended = kv_cache, rows.block_table, output
        if cache.dtype != torch.float32:
            # Our kernel reads float32, so the blocks in use are converted.
            cache = cache[torch.from_numpy(block_table)].flatten(0, 1)
            if self.is_fp8_kv_cache:
                cache = cache.view(FP8[self.kv_cache_dtype])
            cache = cache.float()
            if self.is_fp8_kv_cache:
                halves = cache.view(len(cache), self.num_kv_heads, 2, -1)
                halves[:, :, 0] *= layer._k_scale_float
                halves[:, :, 1] *= layer._v_scale_float
            block_table = np.arange(len(cache), dtype=np.int32).reshape(block_table.shape)
            attended = output.float()
        keys, values = host_views(cache, self.head_size)
        attend_trees(
            query.float().contiguous().numpy(),
            keys,
            values,
            *self._tree_arguments(rows, block_table),
            attended.numpy(),
        )
        if attended is not output:
            output.copy_(attended)
