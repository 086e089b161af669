# SPDX-License-Identifier: Apache-2.0
"""Tree attention over vLLM's CPU cache, compiled by Numba.

vLLM's C++ kernel has causal masks only. A tree has few rows, which share a request and a root, so
one pass per request and KV head over the cache, in place, is faster than a dozen small PyTorch
operations.
"""

import numpy as np

from vllm_spechub.cpu.tree_kernels.vector_math import exp_sum, f32, i32, jit, jit_sums

# Rows of positions are padded to whole vectors of this many floats, and every block size is a
# multiple of it, because the remainder of a loop over vectors costs as much as several vectors.
VECTOR = 16


@jit
def _gather_values(
    # [num_blocks, num_kv_heads, 2, block_size, head_size]
    value_cache,
    # [max_blocks]
    blocks,
    head,
    # positions: the first one, at a block's start; the root's; and one past the last
    begin,
    root,
    end,
    # [head_size, num_positions padded], written: zeros past the end
    values,
):
    """Copy one head's values of a request into rows of positions, the layout that its keys have."""
    head_size = values.shape[0]
    block_size = value_cache.shape[3]
    for start in range(begin, end, block_size):
        stored = value_cache[blocks[start // block_size], head, 1]
        for s in range(min(block_size, end - start)):
            for d in range(head_size):
                values[d, start - begin + s] = stored[s, d]
    # A slot after the root may never have been written, and 0 * NaN is NaN.
    for s in range(root - begin, end - begin):
        for d in range(head_size):
            if not np.isfinite(values[d, s]):
                values[d, s] = f32(0.0)
    for d in range(head_size):
        for s in range(end - begin, values.shape[1]):
            values[d, s] = f32(0.0)


@jit
def _score(
    # [head_size] each, two rows at a time: they share the loads of the keys
    qa,
    qb,
    softmax_scale,
    # [head_size, block_size]
    keys,
    # [num_keys in the block] each
    row_a,
    row_b,
):
    """Write the scores of two query rows against the keys of a block."""
    row_a[:] = f32(0.0)
    row_b[:] = f32(0.0)
    for d in range(0, keys.shape[0], 4):
        k0, k1, k2, k3 = keys[d], keys[d + 1], keys[d + 2], keys[d + 3]
        a0, a1 = qa[d] * softmax_scale, qa[d + 1] * softmax_scale
        a2, a3 = qa[d + 2] * softmax_scale, qa[d + 3] * softmax_scale
        b0, b1 = qb[d] * softmax_scale, qb[d + 1] * softmax_scale
        b2, b3 = qb[d + 2] * softmax_scale, qb[d + 3] * softmax_scale
        for s in range(row_a.shape[0]):
            row_a[s] += (a0 * k0[s] + a1 * k1[s]) + (a2 * k2[s] + a3 * k3[s])
            row_b[s] += (b0 * k0[s] + b1 * k1[s]) + (b2 * k2[s] + b3 * k3[s])


@jit
def _mask(
    # [num_positions]
    row,
    tree_mask,
    # offsets in the row: the start of the token's window; the root; and one past the last position
    window_start,
    root,
    end,
    softcap,
):
    """Apply the soft cap to a row of scores, and set what the token does not see to -inf."""
    if softcap > f32(0.0):
        for s in range(end):
            row[s] = np.tanh(row[s] / softcap) * softcap
    for s in range(min(window_start, root)):
        row[s] = f32(-np.inf)
    for s in range(root, end):
        node = s - root
        if node > 63 or (tree_mask >> np.uint64(node)) & np.uint64(1) == np.uint64(0):
            row[s] = f32(-np.inf)
    row[end:] = f32(-np.inf)


@jit
def _exponentials(
    # [num_positions]
    row,
    # a logit that the softmax counts as well, -inf for none
    sink,
    # [num_positions] each
    scratch,
    scratch_bits,
):
    """Replace a row of scores by their exponentials, relative to the largest. Returns the sum, the
    sink's included."""
    top = sink
    for s in range(row.shape[0]):
        top = top if top > row[s] else row[s]
    return exp_sum(row, top, f32(1.0), scratch, scratch_bits) + np.exp(sink - top)


@jit_sums
def _weigh(
    # [num_positions] each
    wa,
    wb,
    # what the weights add up to
    total_a,
    total_b,
    # [head_size, num_positions]
    values,
    # [head_size] each, written
    out_a,
    out_b,
):
    """Write the means of the values under two rows of weights."""
    for d in range(0, values.shape[0], 4):
        v0, v1, v2, v3 = values[d], values[d + 1], values[d + 2], values[d + 3]
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = f32(0.0)
        for s in range(wa.shape[0]):
            a0 += wa[s] * v0[s]
            a1 += wa[s] * v1[s]
            a2 += wa[s] * v2[s]
            a3 += wa[s] * v3[s]
            b0 += wb[s] * v0[s]
            b1 += wb[s] * v1[s]
            b2 += wb[s] * v2[s]
            b3 += wb[s] * v3[s]
        out_a[d], out_a[d + 1] = a0 / total_a, a1 / total_a
        out_a[d + 2], out_a[d + 3] = a2 / total_a, a3 / total_a
        out_b[d], out_b[d + 1] = b0 / total_b, b1 / total_b
        out_b[d + 2], out_b[d + 3] = b2 / total_b, b3 / total_b


@jit
def _store(
    # [num_tokens, num_kv_heads, head_size] each
    key,
    value,
    # [num_tokens] int64, negative for tokens that are not kept
    slots,
    # the two views that `attend_trees` takes
    key_cache,
    value_cache,
):
    """Write keys and values into their slots."""
    block_size, head_size = value_cache.shape[3:]
    for t in range(min(key.shape[0], slots.shape[0])):
        if slots[t] < 0:
            continue
        block, offset = slots[t] // block_size, slots[t] % block_size
        for h in range(key.shape[1]):
            for d in range(head_size):
                key_cache[block, h, 0, d, offset] = key[t, h, d]
                value_cache[block, h, 1, offset, d] = value[t, h, d]


@jit
def _clip_to_window(
    # int64
    tree_mask,
    # position of the root
    root,
    # how many positions a token sees, its own included; 0 stands for all
    window,
):
    """A tree token's mask without the ancestors before its window, and the window's first key."""
    mask = np.uint64(tree_mask)
    if window <= 0:
        return mask, np.int64(0)
    num_ancestors = np.int64(0)
    bits = mask
    while bits != np.uint64(0):
        bits &= bits - np.uint64(1)
        num_ancestors += 1
    for _ in range(num_ancestors - window):
        mask &= mask - np.uint64(1)
    return mask, max(root + num_ancestors - window, np.int64(0))


@jit
def attend_trees(
    # [num_tokens, num_heads, head_size] float32
    query,
    # [num_blocks, num_kv_heads, 2, head_size, block_size] float32, keys at 0
    key_cache,
    # [num_blocks, num_kv_heads, 2, block_size, head_size] float32, the same memory: values at 1
    value_cache,
    # [num_tree_reqs, max_blocks] int32
    block_table,
    # [num_tree_reqs] int32, keys that the cache holds
    seq_lens,
    # [num_tree_reqs] int64, the first tree token and how many there are
    first_token,
    num_tree_tokens,
    # [num_tokens] int32, the root's position, one for all tokens of a tree
    visible_until,
    # [num_tokens] int64
    tree_mask,
    softmax_scale,
    softcap,
    # how many positions a token sees, its own included, 0 for all; a tree's positions are depths
    window,
    # [num_heads] float32, a logit that each softmax counts as well; -inf for none
    sinks,
    # [num_tokens, num_heads, head_size] float32
    output,
):
    """Write the attention of every tree token; other tokens' output is left alone.

    The CPU's version of `triton_kernels.tree_attention`, for the tree tokens of a batch.
    """
    head_size = query.shape[2]
    num_kv_heads, block_size = value_cache.shape[1], value_cache.shape[3]
    group = query.shape[1] // num_kv_heads
    longest = (seq_lens.max() + VECTOR - 1) // VECTOR * VECTOR
    flat_values = np.empty(head_size * longest, f32)
    row_a, row_b = np.empty(longest, f32), np.empty(longest, f32)
    scratch = np.empty(longest, f32)
    scratch_bits = scratch.view(i32)
    unread = np.empty(head_size, f32)
    masks = np.empty(num_tree_tokens.max(), np.uint64)
    window_starts = np.empty(num_tree_tokens.max(), np.int64)
    for r in range(seq_lens.shape[0]):
        first, num_rows, end = first_token[r], num_tree_tokens[r] * group, np.int64(seq_lens[r])
        root = min(np.int64(visible_until[first]), end)
        for t in range(num_tree_tokens[r]):
            masks[t], window_starts[t] = _clip_to_window(
                tree_mask[first + t], np.int64(visible_until[first]), window
            )
        # Blocks that no window reaches are not read: vLLM may have given them to another request.
        begin = window_starts[: num_tree_tokens[r]].min() // block_size * block_size
        width = (end - begin + VECTOR - 1) // VECTOR * VECTOR
        a, b, power, bits = row_a[:width], row_b[:width], scratch[:width], scratch_bits[:width]
        values = flat_values[: head_size * width].reshape(head_size, width)
        for h in range(num_kv_heads):
            _gather_values(value_cache, block_table[r], h, begin, root, end, values)
            for i in range(0, num_rows, 2):
                # an odd last row is paired with itself, into results that nobody reads
                j = min(i + 1, num_rows - 1)
                ti, tj = i // group, j // group
                hi, hj = h * group + i % group, h * group + j % group
                qa, qb = query[first + ti, hi], query[first + tj, hj]
                for start in range(begin, end, block_size):
                    stored = key_cache[block_table[r, start // block_size], h, 0]
                    here = slice(start - begin, min(start - begin + block_size, width))
                    _score(qa, qb, softmax_scale, stored, a[here], b[here])
                _mask(a, masks[ti], window_starts[ti] - begin, root - begin, end - begin, softcap)
                _mask(b, masks[tj], window_starts[tj] - begin, root - begin, end - begin, softcap)
                total_a = _exponentials(a, sinks[hi], power, bits)
                total_b = _exponentials(b, sinks[hj], power, bits)
                out_b = output[first + tj, hj] if j > i else unread
                _weigh(a, b, total_a, total_b, values, output[first + ti, hi], out_b)


@jit
def store_and_attend(
    # [num_tokens, num_kv_heads, head_size] float32 each
    key,
    value,
    # [num_tokens] int64, negative for tokens that are not kept
    slots,
    query,
    key_cache,
    value_cache,
    *rest,
):
    """Write keys and values into their slots, then call `attend_trees` with the other arguments.

    A single call from Python matters in small batches.
    """
    _store(key, value, slots, key_cache, value_cache)
    attend_trees(query, key_cache, value_cache, *rest)
