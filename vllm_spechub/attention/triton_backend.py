# SPDX-License-Identifier: Apache-2.0
"""vLLM's Triton attention with tree masks, registered as the CUSTOM backend on GPUs.

Requests with a tree run our kernel, and so does any batch inside a FULL graph, which replays the
attention that it captured without looking at new metadata: the captured call is ours and reads
visibility from buffers that every `build` refills. Elsewhere the requests after the last one with a
tree, prompts above all, run vLLM's FlashAttention, which reads the same cache.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVQuantMode

from vllm_spechub.attention.visibility import TreeVisibility
from vllm_spechub.triton_kernels.tree_attention import CAUSAL, MAX_HEAD_SIZE, tree_attention

FLASH_DTYPES = (torch.float16, torch.bfloat16)
BLOCK_LENGTHS = (1, 2, 4, 8, 16, 32, 64)
"""Lengths of requests that between them need every size of block (`launch_config`)."""


class PlainRequests(NamedTuple):
    """The requests of a batch after the last one with a tree."""

    # how many requests and tokens come before
    num_reqs_before: int
    num_tokens_before: int
    # of the requests before, and of these
    max_query_len_before: int
    max_query_len: int
    # [num_reqs + 1] int32, from 0 on
    query_start_loc: torch.Tensor


@dataclass(kw_only=True)
class TritonTreeMetadata(TritonAttentionMetadata):
    """vLLM's metadata, the visibility of each token, and which requests need it."""

    # [at least num_actual_tokens] int32
    visible_until: torch.Tensor
    # [at least num_actual_tokens] int64
    tree_mask: torch.Tensor
    # [num_reqs + 1] int32
    query_start_loc_cpu: torch.Tensor
    # how many requests, from the first one on, only our kernel can attend for
    num_reqs_before_plain: int

    @cached_property
    def plain(self) -> PlainRequests | None:
        """The requests that FlashAttention can attend for, made for the first layer; None if there
        are none."""
        before = self.num_reqs_before_plain
        lengths = self.query_start_loc_cpu.diff()
        if not lengths[before:].any():
            return None
        num_tokens_before = int(self.query_start_loc_cpu[before])
        query_start_loc = self.query_start_loc[before:]
        return PlainRequests(
            before,
            num_tokens_before,
            int(lengths[:before].max()) if before else 0,
            int(lengths[before:].max()),
            query_start_loc - num_tokens_before if num_tokens_before else query_start_loc,
        )


class TritonTreeBackend(TritonAttentionBackend):
    """vLLM's Triton backend with tree masks.

    It declares the features of vLLM's backend; `TritonTreeImpl` refuses a layer that uses one which
    trees do not support, and names the feature.
    """

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["TritonTreeImpl"]:
        return TritonTreeImpl

    @staticmethod
    def get_builder_cls() -> type["TritonTreeMetadataBuilder"]:
        return TritonTreeMetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 32 <= head_size <= MAX_HEAD_SIZE

    # The features below belong to a batch, so `TritonTreeImpl` could not refuse them.
    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False  # the number of splits follows the batch's size


def cache_views(
    # [num_blocks, num_kv_heads, block_size, 2 * head_size]
    kv_cache: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value views [num_blocks, block_size, num_kv_heads, head_size] of a layer's cache."""
    key, value = kv_cache.transpose(1, 2).chunk(2, dim=-1)
    return key, value


class TritonTreeMetadataBuilder(TritonAttentionMetadataBuilder):
    """Builds metadata with each token's visibility, in buffers that CUDA graphs can replay."""

    # Every graph, whatever its mix of requests, reads the buffers below.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    accepts_tree = True

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # vLLM would capture all its draft steps in one graph, where the tree could not change.
        self.supports_draft_decode_metadata_update = False
        # No pass of the target or the draft is wider.
        max_num_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        # [max_num_tokens] each
        self.visible_until = torch.full((max_num_tokens,), CAUSAL, dtype=torch.int32, device=device)
        self.tree_mask = torch.zeros(max_num_tokens, dtype=torch.int64, device=device)

    def share_visibility(
        self,
        # [max_num_tokens] int32
        visible_until: torch.Tensor,
        # [max_num_tokens] int64
        tree_mask: torch.Tensor,
    ) -> None:
        """Read visibility from buffers that are filled before `build` is called."""
        self.visible_until, self.tree_mask = visible_until, tree_mask

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        *,
        tree: TreeVisibility | None = None,
    ) -> TritonTreeMetadata:
        """Build one batch's metadata; without `tree`, for requests without a tree.

        Args:
            tree: visibility of at least every token that belongs to a request.

        Raises:
            ValueError: more tokens than the engine was configured for.
        """
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        num_tokens = metadata.num_actual_tokens
        if num_tokens > len(self.visible_until):
            raise ValueError(
                f"common_attn_metadata: {num_tokens} tokens exceed {len(self.visible_until)}, "
                "the engine's max_num_batched_tokens"
            )
        trees = np.zeros(0, dtype=np.int64)
        if tree is None:
            # A graph that reads the buffers may be replayed with this batch.
            self.visible_until[:num_tokens].fill_(CAUSAL)
        else:
            if tree.visible_until.data_ptr() != self.visible_until.data_ptr():
                num_tokens = min(num_tokens, len(tree.visible_until))
                self.visible_until[:num_tokens].copy_(tree.visible_until[:num_tokens])
                self.tree_mask[:num_tokens].copy_(tree.tree_mask[:num_tokens])
            trees = tree.num_tree_tokens
        return TritonTreeMetadata(
            **vars(metadata),
            visible_until=self.visible_until,
            tree_mask=self.tree_mask,
            query_start_loc_cpu=common_attn_metadata.query_start_loc_cpu,
            num_reqs_before_plain=int(np.flatnonzero(trees).max(initial=-1)) + 1,
        )

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> TritonTreeMetadata:
        metadata = super().build_for_cudagraph_capture(common_attn_metadata)
        assert isinstance(metadata, TritonTreeMetadata)  # made by `build`
        # A replay may have a tree anywhere.
        metadata.num_reqs_before_plain = common_attn_metadata.num_reqs
        return metadata


class TritonTreeImpl(TritonAttentionImpl):
    """vLLM's Triton attention of one layer, with tree masks.

    Attributes:
        every_block: whether each call also launches the kernels with the larger blocks of longer
            requests, so that none is compiled when such a request comes; set while vLLM warms up.

    Raises:
        ValueError: on construction, for a layer with a feature that the kernel lacks.
    """

    every_block: ClassVar[bool] = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: AttentionType = AttentionType.DECODER,
        # a layer's name, although vLLM's annotation says otherwise
        kv_sharing_target_layer_name: Any = None,
        sinks: torch.Tensor | None = None,
        use_alibi_sqrt: bool = False,
        chunk_lookback: int = -1,
    ) -> None:
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            sinks,
            use_alibi_sqrt,
            chunk_lookback,
        )
        kind = AttentionType(attn_type).value
        no_spec = "serve this model without --speculative-config"
        for feature, used, remedy in (
            ("ALiBi", alibi_slopes is not None or use_alibi_sqrt, no_spec),
            ("chunked attention", chunk_lookback > -1, no_spec),
            (f"{kind} attention", kind != AttentionType.DECODER.value, no_spec),
            (
                f"kv_cache_dtype={kv_cache_dtype!r}",
                self._kv_quant_mode not in (KVQuantMode.NONE, KVQuantMode.FP8_PER_TENSOR),
                "set --kv-cache-dtype auto or fp8",
            ),
        ):
            if used:
                raise ValueError(f"spechub: draft trees do not support {feature}; {remedy}")
        self.supports_quant_query_input = False
        self.window = sliding_window or 0
        # None where there is no FlashAttention, or none for such a cache; sinks need our kernel
        self.flash_version: int | None = None
        if self._kv_quant_mode == KVQuantMode.NONE and head_size % 8 == 0 and sinks is None:
            self.flash_version = fa_utils.get_flash_attn_version(
                head_size=head_size, requires_softcap=bool(self.logits_soft_cap)
            )

    def fused_output_quant_supported(self, quant_key) -> bool:
        return False

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
        # None in a profiling run, although vLLM's annotation says otherwise
        attn_metadata: TritonTreeMetadata,
        # [num_tokens, num_heads, head_size]
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend to the paged cache; this step's keys and values are already in it."""
        if attn_metadata is None:
            return super().forward(
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
        key_scale = value_scale = None
        if self._kv_quant_mode == KVQuantMode.FP8_PER_TENSOR:
            kv_cache = kv_cache.view(self.fp8_dtype)
            key_scale, value_scale = layer._k_scale, layer._v_scale
        key_cache, value_cache = cache_views(kv_cache)
        num_reqs, num_tokens = len(attn_metadata.seq_lens), attn_metadata.num_actual_tokens
        max_query_len = attn_metadata.max_query_len
        plain = None
        if self.flash_version is not None and query.dtype in FLASH_DTYPES:
            plain = attn_metadata.plain
        if plain is not None:
            self._attend_plain(plain, attn_metadata, query, key_cache, value_cache, output)
            num_reqs, num_tokens = plain.num_reqs_before, plain.num_tokens_before
            max_query_len = plain.max_query_len_before
        if num_tokens == 0:
            return output
        lengths = [max_query_len]
        if self.every_block:
            lengths += [most for most in BLOCK_LENGTHS if most > max_query_len]
        for most in lengths:
            tree_attention(
                query[:num_tokens],
                key_cache,
                value_cache,
                output[:num_tokens],
                attn_metadata.query_start_loc[: num_reqs + 1],
                attn_metadata.seq_lens[:num_reqs],
                attn_metadata.block_table[:num_reqs],
                attn_metadata.visible_until,
                attn_metadata.tree_mask,
                self.scale,
                most,
                self.logits_soft_cap,
                self.window,
                key_scale,
                value_scale,
                self.sinks,
            )
        return output

    def _attend_plain(
        self,
        plain: PlainRequests,
        metadata: TritonTreeMetadata,
        # [num_tokens, num_heads, head_size]
        query: torch.Tensor,
        # [num_blocks, block_size, num_kv_heads, head_size]
        key_cache: torch.Tensor,
        # [num_blocks, block_size, num_kv_heads, head_size]
        value_cache: torch.Tensor,
        # [num_tokens, num_heads, head_size], written
        output: torch.Tensor,
    ) -> None:
        """FlashAttention for requests without a tree, as vLLM's own backend calls it."""
        tokens = slice(plain.num_tokens_before, metadata.num_actual_tokens)
        reqs = slice(plain.num_reqs_before, None)
        # CUDA only, so that its module does not declare it
        attend: Any = vars(fa_utils)["flash_attn_varlen_func"]
        attend(
            q=query[tokens],
            # tensor maps of the hardware need strides that are multiples of 16 bytes
            k=canonicalize_singleton_dim_strides(key_cache),
            v=canonicalize_singleton_dim_strides(value_cache),
            out=output[tokens],
            cu_seqlens_q=plain.query_start_loc,
            max_seqlen_q=plain.max_query_len,
            seqused_k=metadata.seq_lens[reqs],
            max_seqlen_k=metadata.max_seq_len,
            softmax_scale=self.scale,
            causal=True,
            window_size=[self.window - 1, 0] if self.window else [-1, -1],
            block_table=metadata.block_table[reqs],
            softcap=self.logits_soft_cap,
            fa_version=self.flash_version,
        )
