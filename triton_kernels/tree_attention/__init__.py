# SPDX-License-Identifier: Apache-2.0
"""Paged attention over a batch that mixes draft trees with ordinary causal tokens."""

import torch

from .reference import CAUSAL, tree_attention_reference

__all__ = ["CAUSAL", "MAX_HEAD_SIZE", "tree_attention", "tree_attention_reference"]

MIN_BLOCK_SIZE = 16
MAX_HEAD_SIZE = 256
"""The largest head for which the kernel was compiled for GPUs without spilling registers."""
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def tree_attention(
    # [num_tokens, num_q_heads, head_size]
    query: torch.Tensor,
    # [num_blocks, block_size, num_kv_heads, head_size]
    key_cache: torch.Tensor,
    # [num_blocks, block_size, num_kv_heads, head_size]
    value_cache: torch.Tensor,
    # [num_tokens, num_q_heads, head_size]
    output: torch.Tensor,
    # [num_reqs + 1]
    query_start_loc: torch.Tensor,
    # [num_reqs]
    seq_lens: torch.Tensor,
    # [num_reqs, max_num_blocks]
    block_table: torch.Tensor,
    # [num_tokens]
    visible_until: torch.Tensor,
    # [num_tokens]
    tree_mask: torch.Tensor,
    scale: float,
    max_query_len: int,
    softcap: float = 0.0,
    window: int = 0,
    # [1] each
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    # [num_q_heads]
    sinks: torch.Tensor | None = None,
) -> None:
    """Attend every query token to the keys it may see and write the result into `output`.

    Token `t` of a request sees the key at sequence position `s < seq_len` iff
    `s < visible_until[t]`, or `0 <= s - visible_until[t] < 64` and bit `s - visible_until[t]` of
    `tree_mask[t]` is set. So an ordinary token at position `p` has `visible_until = p + 1` and
    mask 0; tree node `j` (breadth-first number) of a tree whose root sits at position `r` has
    `visible_until = r` and a mask of its ancestors and itself, bit `i` standing for node `i`.
    `visible_until = CAUSAL` marks an ordinary token whose position follows from its place in the
    request; its mask is ignored.

    A sliding window counts positions, which in a tree are depths: a token at position `p` sees no
    key at a position of `p - window` or before. An ordinary token's position is its place in the
    sequence, a tree node's is the root's plus its depth, one less than the bits of its mask.

    Args:
        query: bf16, fp16 or fp32, last dimension contiguous.
        key_cache: same dtype, or fp8 (e4m3 or e5m2) with scales; any strides. A slot that no token
            of the request sees may hold anything, NaN included.
        value_cache: as `key_cache`.
        output: same dtype as `query`, last dimension contiguous. Rows from `query_start_loc[-1]`
            on (CUDA graph padding) are left alone; a token that sees nothing gets zeros.
        query_start_loc: int32. Requests may have no query tokens.
        seq_lens: int32, keys of the request in the cache, this step's tokens included.
        block_table: int32.
        visible_until: int32; may be longer than `query`.
        tree_mask: int64; may be longer than `query`. Bit 63 is the sign bit.
        scale: factor on the scores.
        max_query_len: longest request of the batch. It only tunes the launch, so that a CUDA
            graph may replay any split of its tokens into requests.
        softcap: `c` in `c * tanh(score / c)`; 0 turns it off.
        window: how many positions a token sees, its own included; 0 stands for all. Blocks
            before every token's window are not read.
        key_scale: float32, what stored keys are multiplied by; needed for fp8 and only there.
        value_scale: as `key_scale`.
        sinks: any float dtype. A logit for each head that every token's softmax also counts, as if
            it were a key whose value is zero (StreamingLLM, Xiao et al., ICLR 2024, arXiv
            2309.17453, as gpt-oss learns them). It is neither scaled nor capped, and is in every
            window.

    Raises:
        ValueError: a shape, dtype or stride does not fit; the message names the argument.
    """
    num_tokens, num_q_heads, head_size = query.shape
    num_reqs = seq_lens.shape[0]
    if query.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"query: dtype {query.dtype}, allowed: bfloat16, float16, float32")
    if output.shape != query.shape or output.dtype != query.dtype:
        raise ValueError(f"output: {list(output.shape)} {output.dtype} does not match query")
    if query.stride(-1) != 1:
        raise ValueError("query: last dimension must be contiguous")
    if output.stride(-1) != 1:
        raise ValueError("output: last dimension must be contiguous")
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.dim() != 4 or cache.shape != key_cache.shape or cache.shape[3] != head_size:
            raise ValueError(
                f"{name}: expected [num_blocks, block_size, num_kv_heads, {head_size}], equal for "
                f"keys and values, got {list(cache.shape)}"
            )
        if cache.dtype not in (query.dtype, *FP8):
            raise ValueError(
                f"{name}: dtype {cache.dtype}, allowed: query's {query.dtype}, float8_e4m3fn, "
                "float8_e5m2"
            )
    for name, scale_of in (("key_scale", key_scale), ("value_scale", value_scale)):
        if (scale_of is None) != (key_cache.dtype not in FP8):
            raise ValueError(f"{name}: needed for an fp8 cache, and only there")
        if scale_of is not None and (scale_of.dtype, scale_of.numel()) != (torch.float32, 1):
            raise ValueError(f"{name}: expected float32 [1]")
    if sinks is not None and (sinks.shape != (num_q_heads,) or not sinks.is_contiguous()):
        raise ValueError(f"sinks: expected contiguous [{num_q_heads}], got {list(sinks.shape)}")
    if num_q_heads % key_cache.shape[2]:
        raise ValueError(
            f"query: {num_q_heads} heads, allowed: a multiple of key_cache's {key_cache.shape[2]}"
        )
    if key_cache.shape[1] < MIN_BLOCK_SIZE:
        raise ValueError(
            f"key_cache: block size {key_cache.shape[1]}, allowed: {MIN_BLOCK_SIZE} and more"
        )
    if query_start_loc.dtype != torch.int32 or query_start_loc.shape[0] != num_reqs + 1:
        raise ValueError("query_start_loc: expected int32 [num_reqs + 1]")
    if seq_lens.dtype != torch.int32:
        raise ValueError("seq_lens: expected int32 [num_reqs]")
    if block_table.dtype != torch.int32 or block_table.shape[0] < num_reqs:
        raise ValueError("block_table: expected int32 [num_reqs, max_num_blocks]")
    if block_table.stride(-1) != 1:
        raise ValueError("block_table: last dimension must be contiguous")
    if visible_until.dtype != torch.int32 or visible_until.shape[0] < num_tokens:
        raise ValueError("visible_until: expected int32 [num_tokens]")
    if tree_mask.dtype != torch.int64 or tree_mask.shape[0] < num_tokens:
        raise ValueError("tree_mask: expected int64 [num_tokens]")

    if query.is_cuda:
        from .kernel import tree_attention_triton as implementation
    else:
        implementation = tree_attention_reference
    implementation(
        query,
        key_cache,
        value_cache,
        output,
        query_start_loc,
        seq_lens,
        block_table,
        visible_until,
        tree_mask,
        scale,
        max_query_len,
        softcap,
        window,
        key_scale,
        value_scale,
        sinks,
    )
