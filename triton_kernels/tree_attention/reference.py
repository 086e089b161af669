# SPDX-License-Identifier: Apache-2.0
"""Tree attention in plain PyTorch: what the kernel is tested against, and the CPU path."""

import torch

# `visible_until` of a token whose visibility follows from its place in the request.
CAUSAL = -1
MASK_BITS = 64


def visible_keys(
    # [query_len]
    visible_until: torch.Tensor,
    # [query_len]
    tree_mask: torch.Tensor,
    seq_len: int,
    window: int = 0,
) -> torch.Tensor:
    """Which of a request's keys each of its query tokens sees.

    Args:
        visible_until: int32, `CAUSAL` for ordinary tokens.
        tree_mask: int64.
        seq_len: keys of the request in the cache.
        window: as `tree_attention`.

    Returns:
        bool [query_len, seq_len].
    """
    query_len = visible_until.shape[0]
    device = visible_until.device
    is_causal = visible_until < 0
    causal_until = torch.arange(seq_len - query_len + 1, seq_len + 1, device=device)
    until = torch.where(is_causal, causal_until, visible_until.long())
    mask = tree_mask.masked_fill(is_causal, 0)
    # [query_len, seq_len]
    node = torch.arange(seq_len, device=device) - until[:, None]
    bit = (mask[:, None] >> node.clamp(0, MASK_BITS - 1)) & 1
    visible = (node < 0) | ((node < MASK_BITS) & (bit == 1))
    if window > 0:
        # [query_len, MASK_BITS] how many of a token's ancestors, itself included, up to each node
        ancestors = ((mask[:, None] >> torch.arange(MASK_BITS, device=device)) & 1).cumsum(1)
        depth = ancestors.gather(1, node.clamp(0, MASK_BITS - 1))
        key_position = until[:, None] + torch.where(node < 0, node, depth - 1)
        position = until[:, None] + ancestors[:, -1:] - 1
        visible &= position - key_position < window
    return visible


def tree_attention_reference(
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
    """Attend request by request, in fp32. Arguments as `tree_attention`."""
    block_size, num_kv_heads = key_cache.shape[1:3]
    group_size = query.shape[1] // num_kv_heads
    starts = query_start_loc.tolist()
    for req, seq_len in enumerate(seq_lens.tolist()):
        rows = slice(starts[req], starts[req + 1])
        if rows.start == rows.stop:
            continue
        positions = torch.arange(seq_len, device=query.device)
        blocks = block_table[req, positions // block_size].long()
        # [seq_len, num_kv_heads, head_size]
        keys = key_cache[blocks, positions % block_size].float()
        values = value_cache[blocks, positions % block_size].float()
        if key_scale is not None and value_scale is not None:
            keys, values = keys * key_scale, values * value_scale
        # [query_len, num_kv_heads, group_size, head_size]
        queries = query[rows].float().unflatten(1, (num_kv_heads, group_size))
        # [num_kv_heads, group_size, query_len, seq_len]
        scores = torch.einsum("qhgd,khd->hgqk", queries, keys) * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        visible = visible_keys(visible_until[rows], tree_mask[rows], seq_len, window)
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            sink = sinks.float().view(num_kv_heads, group_size, 1, 1)
            scores = torch.cat([scores, sink.expand(*scores.shape[:3], 1)], dim=-1)
        # A row that sees nothing is all -inf: softmax makes it NaN, and it should be zero.
        weights = torch.softmax(scores, dim=-1)[..., :seq_len]
        weights = weights.masked_fill(~visible.any(1, keepdim=True), 0.0)
        # A slot that nobody sees may hold anything, and a weight of 0 times NaN is NaN.
        values = values.masked_fill(~visible.any(0)[:, None, None], 0.0)
        attended = torch.einsum("hgqk,khd->qhgd", weights, values)
        output[rows] = attended.flatten(1, 2).to(output.dtype)
