# SPDX-License-Identifier: Apache-2.0
"""Tree attention over vLLM's CPU cache, compiled by Numba.

vLLM's C++ kernel masks causally only. A tree has few rows, all of one request below one root: one
pass per request and KV head over the cache in place beats a dozen small PyTorch operations.
"""

import numpy as np

from vllm_spechub.host_kernels.compiled import argmax, exp_row, f32, i32, jit, jit_sums


@jit
def _score(
    # [head_size] each, two rows at a time: they share the loads of the keys
    qa,
    qb,
    # [head_size, block_size]
    keys,
    # [num_keys in the block] each
    row_a,
    row_b,
):
    row_a[:] = f32(0.0)
    row_b[:] = f32(0.0)
    for d in range(0, keys.shape[0], 4):
        k0, k1, k2, k3 = keys[d], keys[d + 1], keys[d + 2], keys[d + 3]
        a0, a1, a2, a3 = qa[d], qa[d + 1], qa[d + 2], qa[d + 3]
        b0, b1, b2, b3 = qb[d], qb[d + 1], qb[d + 2], qb[d + 3]
        for s in range(row_a.shape[0]):
            row_a[s] += (a0 * k0[s] + a1 * k1[s]) + (a2 * k2[s] + a3 * k3[s])
            row_b[s] += (b0 * k0[s] + b1 * k1[s]) + (b2 * k2[s] + b3 * k3[s])


@jit
def _weigh(
    # [num_keys in the block] each
    wa,
    wb,
    # [block_size, head_size]
    values,
    # [head_size] each
    out_a,
    out_b,
):
    """Add the weighted values, every one of which is visible."""
    count = wa.shape[0]
    for s in range(0, count - 3, 4):
        v0, v1, v2, v3 = values[s], values[s + 1], values[s + 2], values[s + 3]
        a0, a1, a2, a3 = wa[s], wa[s + 1], wa[s + 2], wa[s + 3]
        b0, b1, b2, b3 = wb[s], wb[s + 1], wb[s + 2], wb[s + 3]
        for d in range(values.shape[1]):
            out_a[d] += (a0 * v0[d] + a1 * v1[d]) + (a2 * v2[d] + a3 * v3[d])
            out_b[d] += (b0 * v0[d] + b1 * v1[d]) + (b2 * v2[d] + b3 * v3[d])
    for s in range(count - count % 4, count):
        v0 = values[s]
        for d in range(values.shape[1]):
            out_a[d] += wa[s] * v0[d]
            out_b[d] += wb[s] * v0[d]


@jit
def _clip_to_window(
    # int64
    tree_mask,
    # position of the root
    root,
    # how many positions a token sees, its own included; 0 stands for all
    window,
):
    """A tree token's mask without the ancestors before its window, and the first key in it."""
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


@jit_sums
def attend_trees(
    # [num_tokens, num_heads, head_size] float32
    query,
    # [num_blocks, num_kv_heads, 2, block_size * head_size] float32: keys transposed, then values
    cache,
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
    # a window counts positions, in a tree depths, and not slots
    window,
    # [num_tokens, num_heads, head_size] float32
    output,
):
    """Write the attention of every tree token; other tokens' output is left alone."""
    head_size = query.shape[2]
    num_kv_heads = cache.shape[1]
    block_size = cache.shape[3] // head_size
    group = query.shape[1] // num_kv_heads
    # an odd last row is paired with one more, whose results nobody reads
    scores = np.empty((num_tree_tokens.max() * group + 1, seq_lens.max()), f32)
    unread = np.empty(head_size, f32)
    scratch = np.empty(seq_lens.max(), f32)
    scratch_bits = scratch.view(i32)
    masks = np.empty(num_tree_tokens.max(), np.uint64)
    window_starts = np.empty(num_tree_tokens.max(), np.int64)
    for r in range(seq_lens.shape[0]):
        first, num_rows, length = first_token[r], num_tree_tokens[r] * group, seq_lens[r]
        num_blocks = (length + block_size - 1) // block_size
        root = min(np.int64(visible_until[first]), np.int64(length))
        for t in range(num_tree_tokens[r]):
            masks[t], window_starts[t] = _clip_to_window(
                tree_mask[first + t], np.int64(visible_until[first]), window
            )
        # blocks that no window reaches are not read: vLLM may have given them away
        first_block = window_starts[: num_tree_tokens[r]].min() // block_size
        begin = first_block * block_size
        for h in range(num_kv_heads):
            for b in range(first_block, num_blocks):
                start = b * block_size
                end = min(start + block_size, length)
                keys = cache[block_table[r, b], h, 0].reshape(head_size, block_size)
                for i in range(0, num_rows, 2):
                    j = min(i + 1, num_rows - 1)
                    _score(
                        query[first + i // group, h * group + i % group],
                        query[first + j // group, h * group + j % group],
                        keys,
                        scores[i, start:end],
                        scores[i + 1, start:end],
                    )
            for i in range(num_rows):
                row = scores[i, begin:length]
                for s in range(row.shape[0]):
                    row[s] *= softmax_scale
                if softcap > f32(0.0):
                    for s in range(row.shape[0]):
                        row[s] = np.tanh(row[s] / softcap) * softcap
                mask = masks[i // group]
                for s in range(begin, min(window_starts[i // group], root)):
                    row[s - begin] = f32(-np.inf)
                for s in range(root, length):
                    node = s - root
                    if node > 63 or (mask >> np.uint64(node)) & np.uint64(1) == np.uint64(0):
                        row[s - begin] = f32(-np.inf)
                top = row[argmax(row)]
                for s in range(row.shape[0]):
                    row[s] -= top
                exp_row(row, scratch, scratch_bits)
                total = f32(0.0)
                for s in range(row.shape[0]):
                    total += row[s]
                for s in range(row.shape[0]):
                    row[s] /= total
            for i in range(0, num_rows, 2):
                j = min(i + 1, num_rows - 1)
                out_a = output[first + i // group, h * group + i % group]
                out_b = output[first + j // group, h * group + j % group] if j > i else unread
                out_a[:] = f32(0.0)
                out_b[:] = f32(0.0)
                for b in range(first_block, num_blocks):
                    start = b * block_size
                    end = min(start + block_size, length)
                    context = min(max(root, start), end)
                    values = cache[block_table[r, b], h, 1].reshape(block_size, head_size)
                    _weigh(
                        scores[i, start:context], scores[i + 1, start:context], values, out_a, out_b
                    )
                    # Below the root a slot may never have been written, and 0 * NaN is NaN.
                    for s in range(context, end):
                        if scores[i, s] > f32(0.0):
                            for d in range(head_size):
                                out_a[d] += scores[i, s] * values[s - start, d]
                        if j > i and scores[j, s] > f32(0.0):
                            for d in range(head_size):
                                out_b[d] += scores[j, s] * values[s - start, d]
