# SPDX-License-Identifier: Apache-2.0
"""The CPU's compiled versions of our kernels, against the PyTorch references and on their own."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from vllm_spechub.cpu.tree_kernels import sampling, vector_math
from vllm_spechub.cpu.tree_kernels.attention import store_and_attend
from vllm_spechub.cpu.tree_kernels.sampling import (
    sample_children,
    verify_tree,
    write_tokens,
)
from vllm_spechub.cpu.tree_kernels.warm_up import warm_up
from vllm_spechub.rules.acceptance import acceptance
from vllm_spechub.rules.draft_state import DraftState
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels import rng
from vllm_spechub.triton_kernels.arguments import (
    Children,
    Requests,
    TargetRows,
    TreeTables,
)
from vllm_spechub.triton_kernels.arguments import (
    Drafts as DraftTensors,
)
from vllm_spechub.triton_kernels.child_sampling import reference as child_reference
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES
from vllm_spechub.triton_kernels.tree_attention import tree_attention_reference
from vllm_spechub.triton_kernels.verification import reference as tree_reference

RULES = tuple(BUILTIN_RULES)
BRANCHING = tuple(name for name, rule in BUILTIN_RULES.items() if rule.max_children > 1)
SPECHUB = tuple(name for name, rule in BUILTIN_RULES.items() if rule.sharpens)

TREES = ["binary:3", "chain:3", "kary:4:2", [0, 0, 0, 0, 1, 1, 2, 5]]


class Drafts:
    """Random drafts of one tree, drawn with the references, and target rows that resemble them."""

    def __init__(self, tree, vocab_size, temperatures, rule, num_reqs=60, seed=0, sharpening=1.0):
        g = torch.Generator().manual_seed(seed)
        self.tree = TokenTree.parse(tree)
        self.num_reqs, width = num_reqs, self.tree.num_nodes + 1
        self.rule = {"rule": rule, "sharpening": sharpening}
        parents = np.array([0, *self.tree.parents], dtype=np.int32)
        shape = (self.tree.first_child, self.tree.num_children, self.tree.internal_index, parents)
        self.tables = TreeTables(*map(torch.from_numpy, shape))
        self.temperature = torch.tensor(temperatures).repeat(num_reqs)[:num_reqs]
        self.seeds = torch.randint(-(2**62), 2**62, (num_reqs,), generator=g)
        self.positions = torch.randint(0, 10000, (num_reqs,), generator=g)
        self.reqs = torch.arange(num_reqs)
        num_internal = len(self.tree.internal_nodes)
        self.draft = torch.randn(num_reqs, num_internal, vocab_size, generator=g) * 2
        self.target = torch.randn(num_reqs, width, vocab_size, generator=g) * 2
        for node in self.tree.internal_nodes:
            self.target[:, node] = (
                0.5 * self.target[:, node] + self.draft[:, self.tables.internal_index[node]]
            )
        self.draft[:, :, 1] = -torch.inf
        self.target[:, :, 2] = -torch.inf
        self.draft[::7, :, 3] = self.draft[::7, :, 0]  # ties
        self.draft[::11] *= 60  # near certain
        self.draft[5::13, ::2] = -torch.inf  # nothing to draft from
        self.draft[6::13, :, 1:] = -torch.inf  # one token
        self.tokens = torch.zeros(num_reqs, width, dtype=torch.int64)
        self.sampled = torch.zeros(num_reqs, num_internal, dtype=torch.int32)
        self.num_nodes = torch.randint(0, width, (num_reqs,), generator=g, dtype=torch.int32)
        self.num_nodes[::2] = width - 1

    def node_arguments(self, node):
        full = torch.full((self.num_reqs,), int(node), dtype=torch.int32)
        count = torch.full_like(full, int(self.tables.num_children[node]))
        draft = self.draft[:, self.tables.internal_index[node]]
        return (draft, full, count, self.requests), int(count[0])

    @property
    def requests(self):
        return Requests(self.reqs, self.positions, self.temperature, self.seeds)

    def draw(self, sampler):
        """Draw every node's children; what differs between samplers stays comparable."""
        drawn = []
        for node in self.tree.internal_nodes:
            arguments, count = self.node_arguments(node)
            tokens, sampled = sampler(*arguments, **self.rule, max_children=count)
            first = int(self.tables.first_child[node])
            self.tokens[:, first : first + count] = tokens
            self.sampled[:, self.tables.internal_index[node]] = sampled
            drawn.append(torch.cat([tokens, sampled[:, None]], dim=1))
        return drawn

    def verify(self, verifier, drawn=None):
        width = self.tree.num_nodes + 1
        return verifier(
            TargetRows(
                self.target.flatten(0, 1),
                self.temperature,
                torch.arange(self.num_reqs, dtype=torch.int32) * width,
                self.num_nodes,
                self.tokens.flatten(),
                drawn,
            ),
            DraftTensors(self.draft, self.sampled),
            self.requests,
            self.tables,
            level_sizes=self.tree.level_sizes,
            **self.rule,
        )


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(
    ("rule", "sharpening"), [*((r, 1.0) for r in RULES), *((r, 2.5) for r in SPECHUB)]
)
def test_same_tokens_as_the_references(rule, sharpening, tree):
    """Token for token; a near tie may fall the other way once in ten thousand draws."""
    if rule == "chain":
        tree = f"chain:{len(tree)}"
    drawn = wrong = 0
    for vocab_size in (5, 500, 2 * rng.LANES + 905):
        temperatures = [0.0, 0.3, 1.0, 1.7, 0.7]
        drafts = Drafts(
            tree, vocab_size, temperatures, rule, seed=vocab_size, sharpening=sharpening
        )
        ours = drafts.draw(sample_children)
        theirs = drafts.draw(child_reference.sample_children)
        pairs = list(zip(ours, theirs, strict=True))
        pairs += zip(
            drafts.verify(verify_tree), drafts.verify(tree_reference.verify_tree), strict=True
        )
        for a, b in pairs:
            rows = (a != b).reshape(drafts.num_reqs, -1).any(1)
            drawn, wrong = drawn + len(rows), wrong + int(rows.sum())
    assert wrong <= max(1, drawn * 1e-3)


@pytest.mark.parametrize("tree", ["binary:3", "kary:4:2", [0, 0, 0, 1, 1, 3]])
def test_children_are_stored_as_the_state_would(tree):
    tree = TokenTree.parse(tree)
    ours, theirs = (
        DraftState.empty(tree, 9, 64, torch.float32, torch.device("cpu")) for _ in range(2)
    )
    reqs = torch.tensor([4, 1, 7])
    for level in ours.levels:
        num_rows = len(level.rows(3).nodes)
        logits = torch.randn(num_rows, 64)
        tokens = torch.randint(0, 64, (num_rows, level.max_children))
        sampled = torch.randint(0, 16, (num_rows,), dtype=torch.int32)
        write_tokens(ours, level, reqs, Children(tokens, sampled))
        theirs.write_children(level, reqs, logits, Children(tokens, sampled))
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.drafts.sampled, theirs.drafts.sampled)
    assert (ours.tokens[reqs] != 0).any()


@pytest.mark.parametrize("rule", BRANCHING)
def test_skipped_rows_and_half_precision(rule):
    drafts = Drafts("binary:1", 100, [1.0], rule)
    arguments, count = drafts.node_arguments(0)
    arguments = list(arguments)
    arguments[0] = arguments[0].bfloat16()
    skipped = torch.where(drafts.reqs % 3 == 0, -1, drafts.reqs)
    arguments[3] = drafts.requests._replace(req_idx=skipped)
    ours = sample_children(*arguments, rule=rule, max_children=count)
    theirs = child_reference.sample_children(*arguments, rule=rule, max_children=count)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert (ours[0][::3] == -1).all()


@pytest.mark.parametrize("rule", BRANCHING)
def test_emitted_tokens_follow_the_target(rule):
    """One node with unlike draft and target, 40,000 seeds: chi-square of the first token."""
    samples = 40_000
    drafts = Drafts("kary:3:1", 12, [0.8], rule, num_reqs=samples)
    drafts.draft[:] = drafts.draft[1, 0]
    drafts.target[:] = drafts.target[1]
    drafts.num_nodes[:] = 3
    drafts.draw(sample_children)
    tokens, emitted, paths = drafts.verify(verify_tree)
    target = (drafts.target[0, 0].double() / 0.8).softmax(0)
    counts = torch.bincount(tokens[:, 0], minlength=12)
    kept = target * samples > 5
    assert counts[~kept].sum() < 100
    expected = target[kept] / target[kept].sum() * counts[kept].sum()
    assert chisquare(counts[kept].numpy(), expected.numpy()).pvalue > 1e-3

    # and the root accepts as often as the closed form says
    q = (drafts.draft[0, 0].double() / 0.8).softmax(0)
    node, slots = acceptance(target, q, 3, rule)
    assert abs((emitted == 2).double().mean() - node) < 4 * (0.25 / samples) ** 0.5
    for slot in range(3):
        accepted = (emitted == 2) & (paths[:, 1] == slot + 1)
        assert abs(accepted.double().mean() - slots[slot]) < 4 * (0.25 / samples) ** 0.5


COMPILED = (sampling._sample_children, sampling._verify_trees, sampling._write_tokens)


def test_nothing_is_compiled_after_warming_up():
    """Whatever the rule, its direction and the tensors' types are."""
    warm_up()
    compiled = [kernel.nopython_signatures for kernel in COMPILED]
    assert [len(signatures) for signatures in compiled] == [1, 1, 1]
    for rule in RULES:
        tree = TokenTree.chain(2) if rule == "chain" else TokenTree((0, 0, 1))
        drafts = Drafts(list(tree.parents), 33, [0.0, 1.0], rule, num_reqs=6)
        drafts.draw(sample_children)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            drafts.target, drafts.draft = drafts.target.to(dtype), drafts.draft.to(dtype)
            for index in (torch.int32, torch.int64):
                drafts.reqs = drafts.reqs.to(index)
                drafts.draw(sample_children)
                drafts.verify(verify_tree)
                drafts.verify(verify_tree, drawn=torch.zeros(6 * (tree.num_nodes + 1)).long())
    assert [kernel.nopython_signatures for kernel in COMPILED] == compiled


def test_noise_has_the_references_bits():
    key = rng.row_key(torch.tensor([-5]), torch.tensor([77]), 3, rng.CHILD)
    expected = rng.exponential(rng.element_hash(key, 5000))[0].numpy()
    row, scratch, uniforms = (np.empty(5000, np.float32) for _ in range(3))
    found_key = vector_math.row_key(np.int64(-5), np.int64(77), 3, rng.CHILD)
    assert np.uint32(found_key) == key.numpy().view(np.uint32)[0]
    vector_math.exponential_row(found_key, 0, row, row.view(np.int32), scratch, uniforms)
    np.testing.assert_allclose(row, expected, rtol=1e-6)


def test_exp_and_log_are_accurate():
    x = np.linspace(-86, 0, 9999, dtype=np.float32)
    row, scratch = x.copy(), np.empty_like(x)
    vector_math.exp_row(row, scratch, scratch.view(np.int32))
    np.testing.assert_allclose(row, np.exp(x.astype(np.float64)), rtol=3e-7)
    hidden = np.array([-np.inf, -1000, 0], np.float32)
    vector_math.exp_row(hidden, scratch[:3], scratch[:3].view(np.int32))
    assert hidden.tolist() == [0, 0, 1]
    x = np.geomspace(2.0**-33, 20, 9999).astype(np.float32)
    row = x.copy()
    vector_math.log_row(row, row.view(np.int32), scratch)
    np.testing.assert_allclose(row, np.log(x.astype(np.float64)), rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size"), [(4, 2, 64), (3, 3, 32)])
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("window", [0, 2, 20])
@pytest.mark.parametrize("sinks", [(-torch.inf,) * 4, (0.5, 120.0, -3.0, -torch.inf)])
def test_tree_attention(num_heads, num_kv_heads, head_size, block_size, softcap, window, sinks):
    """Whole, truncated and one-node trees, stored on the way; slots that nobody may see hold NaN,
    and so do the blocks before the window."""
    from vllm_spechub.attention.cpu_backend import cache_views, host_views

    torch.manual_seed(0)
    tree = TokenTree.parse("binary:3")
    counts = np.array([15, 6, 1, 15], dtype=np.int64)
    roots = np.array([70, 31, 0, 129])
    seq_lens = (roots + counts).astype(np.int32)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    num_tokens, num_blocks = int(counts.sum()), -(-seq_lens.max() // block_size)
    cache = torch.full((20, num_kv_heads, block_size, 2 * head_size), torch.nan)
    table = torch.randperm(20)[: 4 * num_blocks].view(4, num_blocks).int()
    keys, values = cache_views(cache)
    unwritten = {(0, 3), (3, 9)}  # (request, node): nobody's ancestor but their own
    new_keys, new_values = torch.randn(2, num_tokens, num_kv_heads, head_size)
    slots = torch.full((num_tokens,), -1)
    for r in range(4):
        for slot in range(seq_lens[r]):
            block, offset = table[r, slot // block_size].long(), slot % block_size
            if slot < roots[r]:
                keys[block, offset] = torch.randn(num_kv_heads, head_size)
                values[block, offset] = torch.randn(num_kv_heads, head_size)
            elif (r, node := slot - roots[r]) not in unwritten:
                slots[first[r] + node] = block * block_size + offset
    for r in range(4 if window else 0):
        for block in range(max(roots[r] + 1 - window, 0) // block_size):
            keys[table[r, block].long()] = values[table[r, block].long()] = torch.nan
    until = torch.from_numpy(np.repeat(roots, counts).astype(np.int32))
    masks = [torch.from_numpy(tree.ancestor_masks[:n]) for n in counts]
    query = torch.randn(num_tokens, num_heads, head_size)
    # [num_heads]
    sinks = torch.tensor(sinks[:num_heads])
    found, expected = torch.zeros_like(query), torch.zeros_like(query)
    before = cache.clone()
    store_and_attend(
        new_keys.numpy(),
        new_values.numpy(),
        slots.numpy(),
        query.numpy(),
        *host_views(cache, head_size),
        table.numpy(),
        seq_lens,
        first,
        counts,
        until.numpy(),
        torch.cat(masks).numpy(),
        np.float32(0.2),
        np.float32(softcap),
        window,
        sinks.numpy(),
        found.numpy(),
    )
    expected_keys, expected_values = cache_views(before)
    stored = slots[slots >= 0]
    for there, new in ((expected_keys, new_keys), (expected_values, new_values)):
        there[stored // block_size, stored % block_size] = new[slots >= 0]
    torch.testing.assert_close(cache, before, rtol=0, atol=0, equal_nan=True)
    starts = torch.from_numpy(np.append(first, num_tokens).astype(np.int32))
    tree_attention_reference(
        query,
        keys.nan_to_num(),
        values.nan_to_num(),
        expected,
        starts,
        torch.from_numpy(seq_lens),
        table,
        until,
        torch.cat(masks),
        0.2,
        max_query_len=15,
        softcap=softcap,
        window=window,
        sinks=None if sinks.isinf().all() else sinks,
    )
    seen = torch.ones(num_tokens, dtype=torch.bool)
    for r, node in unwritten:  # these rows see their own unwritten slot
        for below in range(counts[r]):
            seen[first[r] + below] &= not tree.ancestor_masks[below] >> node & 1
    torch.testing.assert_close(found[seen], expected[seen], atol=2e-6, rtol=1e-5)
    assert not found[seen].isnan().any()
