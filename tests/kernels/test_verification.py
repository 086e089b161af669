# SPDX-License-Identifier: Apache-2.0
"""Tree verification: three implementations that agree, greedy walks, losslessness by sampling."""

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from helpers import enumeration
from helpers.drafting import BINARY, CHAIN, UNEQUAL, WIDE, Draft, Tree, draft_tree, huge_rows
from helpers.enumeration import DRAFTING, Grown, Model, accepted
from helpers.written import first_arguments
from vllm_spechub.cpu.tree_kernels import sampling as numba_kernels
from vllm_spechub.measure.doctor.odd_rows import ODD_ROWS
from vllm_spechub.triton_kernels import lanes_device, rng
from vllm_spechub.triton_kernels.arguments import (
    Drafts,
    Requests,
    TargetRows,
    TreeTables,
    VerifiedPaths,
)
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES
from vllm_spechub.triton_kernels.verification import kernel, verify_tree
from vllm_spechub.triton_kernels.verification.reference import reach

SPLITS = lanes_device.SPLITS
RULES = tuple(BUILTIN_RULES)
BRANCHING = tuple(name for name, rule in BUILTIN_RULES.items() if rule.max_children > 1)
SPECHUB = tuple(name for name, rule in BUILTIN_RULES.items() if rule.sharpens)

TREES = {"binary": BINARY, "unequal": UNEQUAL, "chain": CHAIN, "wide": WIDE}
TARGET_TEMPERATURES = [1.0, 0.0, 1.0, 0.5, 1.0, 0.0, 0.02]
DRAFT_TEMPERATURES = [1.0, 1.0, 0.0, 0.5, 0.3, 0.0, 0.02]


def triton_on(device: str):
    def verify(*arguments, **options) -> VerifiedPaths:
        found = kernel.verify_tree(*to(device, arguments), **options)
        return VerifiedPaths(*(value.cpu() for value in found))

    return verify


def to(device: str, arguments) -> list:
    return [
        value._make(None if field is None else field.to(device) for field in value)
        for value in arguments
    ]


def make_case(
    tree: Tree,
    vocab_size: int,
    rule: str,
    dtype: torch.dtype,
    num_reqs: int = 7,
    sharpening: float = 1.0,
    change: Callable[[torch.Tensor, torch.Tensor], None] = lambda target, draft: None,
) -> tuple[list, dict]:
    """Arguments with every temperature, ties, masked tokens, masked rows, and truncated trees.

    `change` may alter the target's and the draft's logits of request states before drafting.
    """
    generator = torch.Generator().manual_seed(vocab_size)
    num_internal = int(tree.internal_index.max()) + 1
    num_rows = len(tree.counts)
    draft_logits = torch.randn(num_reqs, num_internal, vocab_size, generator=generator) * 2
    # Close to the draft, so that walks go deep, with ties in bfloat16.
    target_logits = torch.randn(num_reqs, num_rows, vocab_size, generator=generator) * 0.3
    target_logits[:, tree.internal_index >= 0] += draft_logits
    target_logits[:, :, vocab_size // 2] = -torch.inf
    draft_logits[0, :, 1:] = -torch.inf  # nothing off the hubs
    draft_logits[4, :, vocab_size - 1] = -torch.inf
    draft_logits[3, ::2] = -torch.inf  # nothing at all
    draft_logits[6, ::2, 4:] = -torch.inf  # nothing off four children, at a low temperature
    draft_logits[4, :, 0] += 100.0  # hub mass of 1 in float32
    target_logits[4, :, 0] += 100.0
    draft_logits, target_logits = draft_logits.to(dtype), target_logits.to(dtype)
    change(target_logits, draft_logits)

    # Requests in another order than their states, and rows of other requests in between.
    req_idx = torch.arange(num_reqs).roll(2)
    row_start = torch.arange(num_reqs) * (num_rows + 1) + 1
    rows = torch.full((num_reqs * (num_rows + 1) + 1, vocab_size), float("nan"), dtype=dtype)
    node_tokens = torch.full((len(rows),), -5)
    states = iter(draft_logits[req_idx].unbind(1))
    draft = draft_tree(
        tree,
        lambda path: next(states),
        torch.zeros(num_reqs, dtype=torch.int64),
        torch.tensor(DRAFT_TEMPERATURES).repeat(num_reqs // 7 + 1)[:num_reqs],
        torch.arange(num_reqs) * 1000 - 3,
        req_idx,
        torch.arange(num_reqs) + 50,
        rule,
        sharpening,
    )
    for request in range(num_reqs):
        start = int(row_start[request])
        rows[start : start + num_rows] = target_logits[req_idx[request]]
        node_tokens[start : start + num_rows] = draft.tokens[request]
        node_tokens[start] = -5  # the root's is not read
    num_nodes = torch.full((num_reqs,), tree.num_drafted)
    num_nodes[-1], num_nodes[-2] = 0, tree.num_drafted // 2
    arguments = [
        TargetRows(
            rows,
            torch.tensor(TARGET_TEMPERATURES).repeat(num_reqs // 7 + 1)[:num_reqs],
            row_start.int(),
            num_nodes.int(),
            node_tokens,
        ),
        Drafts(draft.logits, draft.sampled),
        Requests(
            req_idx.int(),
            torch.arange(num_reqs) + 50,
            torch.tensor(DRAFT_TEMPERATURES).repeat(num_reqs // 7 + 1)[:num_reqs],
            torch.arange(num_reqs) * 1000 - 3,
        ),
        tree.tables,
    ]
    options = {"level_sizes": tree.level_sizes, "rule": rule, "sharpening": sharpening}
    return arguments, options


def assert_equal(actual, expected) -> None:
    for value, wanted in zip(actual, expected, strict=True):
        assert value.dtype == wanted.dtype
        assert torch.equal(value, wanted)


def assert_paths(paths: VerifiedPaths, arguments: list, vocab_size: int) -> None:
    """Tokens are the path's, and no node lies past those that are verified."""
    tokens, num_emitted, path = paths
    for request in range(len(tokens)):
        count = int(num_emitted[request])
        emitted = tokens[request, :count]
        assert ((emitted >= 0) & (emitted < vocab_size)).all()
        assert (tokens[request, count:] == -1).all()
        assert (path[request, count:] == -1).all()
        start = int(arguments[0].row_start[request])
        walked = path[request, :count].long()
        assert walked[0] == 0
        assert torch.equal(arguments[3].parents[walked[1:]].long(), walked[:-1])
        assert torch.equal(arguments[0].node_tokens[start + walked[1:]], emitted[:-1])
        assert (walked <= arguments[0].num_nodes[request]).all()


SIZES = [(6, 16, torch.float32), (63, 16, torch.float16), (500, 128, torch.bfloat16)]
KERNEL_CASES = [
    *(("unequal", rule, 1.0, *SIZES[1]) for rule in BRANCHING),
    *(("unequal", rule, 1.0, *size) for rule in ("mixed", "rrs") for size in SIZES[::2]),
    *(("wide", rule, 1.0, *SIZES[1]) for rule in ("mixed", "rrsw")),
    ("binary", "traversal", 1.0, *SIZES[1]),
    *(("chain", rule, 1.0, *SIZES[2]) for rule in ("traversal", "chain")),
    *(("unequal", rule, 2.5, *SIZES[1]) for rule in ("mixed", "ordered")),
]


@pytest.mark.parametrize(
    ("name", "rule", "sharpening", "vocab_size", "lanes", "dtype"), KERNEL_CASES
)
def test_lanes_of_any_number(monkeypatch, device, name, rule, sharpening, vocab_size, lanes, dtype):
    """The Triton kernels equal the reference, whatever a row's tokens and lanes are."""
    monkeypatch.setattr(rng, "LANES", lanes)
    arguments, options = make_case(TREES[name], vocab_size, rule, dtype, sharpening=sharpening)
    expected = verify_tree(*arguments, **options)
    assert_equal(triton_on(device)(*arguments, **options), expected)
    # Some walk, so that more than the root is compared.
    assert expected.num_emitted.max() > 1
    assert_paths(expected, arguments, vocab_size)
    assert (expected.tokens != vocab_size // 2).all()  # masked in the target


@pytest.mark.parametrize(
    ("rule", "vocab_size", "splits"),
    [("mixed", rng.LANES, 1), ("mixed", 2 * rng.LANES + 905, SPLITS), ("ordered", 40_000, 2)],
)
def test_whole_lanes(monkeypatch, device, rule, vocab_size, splits):
    """The Triton kernels with the product's lanes, and several steps of a pass."""
    monkeypatch.setattr(lanes_device, "SPLITS", splits)
    arguments, options = make_case(Tree([3, 2, 0, 1, 0, 0, 0]), vocab_size, rule, torch.float32)
    assert_equal(triton_on(device)(*arguments, **options), verify_tree(*arguments, **options))


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [
        (6, torch.float32),
        (63, torch.float16),
        (500, torch.bfloat16),
        (rng.LANES, torch.float32),
        (2 * rng.LANES + 905, torch.float32),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_numba_equals_the_reference(rule, vocab_size, dtype):
    for tree in (CHAIN,) if rule == "chain" else (UNEQUAL, BINARY, WIDE):
        arguments, options = make_case(tree, vocab_size, rule, dtype, num_reqs=14)
        for sharpening in (1.0, 2.5) if rule in SPECHUB else (1.0,):
            options["sharpening"] = sharpening
            expected = verify_tree(*arguments, **options)
            assert_equal(numba_kernels.verify_tree(*arguments, **options), expected)
            assert_paths(expected, arguments, vocab_size)


def test_alone_as_in_a_batch(monkeypatch, device):
    """A request's outcome does not depend on the others', nor do the sums that it comes from, to
    the last bit: so all ranks and all batches decide alike."""
    monkeypatch.setattr(rng, "LANES", 16)
    monkeypatch.setattr(lanes_device, "SPLITS", 4)
    monkeypatch.setattr(torch, "empty", torch.zeros)  # what is not written can be compared
    arguments, options = make_case(TREES["chain"], 63, "traversal", torch.bfloat16, num_reqs=8)
    target, drafts, requests, tables = arguments
    sums = first_arguments(monkeypatch, kernel, "_statistics_kernel", "_outcome_kernel")

    def verified(implementation, own: slice) -> list[torch.Tensor]:
        sums.clear()
        paths = implementation(
            target._replace(row_start=target.row_start[own], num_nodes=target.num_nodes[own]),
            drafts,
            requests._replace(
                req_idx=requests.req_idx[own], root_positions=requests.root_positions[own]
            ),
            tables,
            **options,
        )
        return [*paths, *sums]

    for implementation in (triton_on(device), numba_kernels.verify_tree):
        together = verified(implementation, slice(8))
        for request in (0, 2):
            own = slice(request, request + 1)
            assert_equal(verified(implementation, own), [value[own] for value in together])


@pytest.mark.parametrize(("rule", "num_reqs"), [("traversal", 28), ("mixed", 28), ("rrs", 20)])
def test_rejections_of_many_requests(monkeypatch, device, rule, num_reqs):
    """Targets that differ from the draft, so that walks end in residuals all over the tree."""
    monkeypatch.setattr(rng, "LANES", 32)
    arguments, options = make_case(UNEQUAL, 20, rule, torch.float32, num_reqs=num_reqs)
    arguments[0].logits.add_(2 * torch.randn(20, generator=torch.Generator().manual_seed(5)))
    expected = verify_tree(*arguments, **options)
    ends = {int(path[path >= 0].max()) for path in expected[2]}
    assert len(ends & set(torch.nonzero(UNEQUAL.num_children).flatten().tolist())) > 2
    assert_equal(triton_on(device)(*arguments, **options), expected)
    assert_equal(numba_kernels.verify_tree(*arguments, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["target", "draft"])
@pytest.mark.parametrize("rule", ["traversal", "mixed", "rrs", "rrsw"])
def test_odd_rows(device, rule, where, dtype):
    """No token outside the vocabulary, the same from all three, other requests as without."""
    tree, vocab_size, num_reqs = Tree([3, 2, 0, 1, 0, 0, 0]), 70, 2 * len(ODD_ROWS)

    def case(nodes: slice) -> tuple[list, dict]:
        def change(target: torch.Tensor, draft: torch.Tensor) -> None:
            for place, make_odd in enumerate(ODD_ROWS.values()):
                for row in (target if where == "target" else draft)[2 * place, nodes]:
                    make_odd(row)

        arguments, options = make_case(tree, vocab_size, rule, dtype, num_reqs, change=change)
        arguments[0].temperature.clamp_(min=0.25)
        arguments[2].temperature.clamp_(min=0.25)
        arguments[0].num_nodes.fill_(tree.num_drafted)
        return arguments, options

    sound, options = case(slice(0, 0))
    sound = verify_tree(*sound, **options)
    # the root's row, and then every one
    for nodes in (slice(0, 1), slice(0, None)):
        arguments, options = case(nodes)
        expected = verify_tree(*arguments, **options)
        assert_paths(expected, arguments, vocab_size)
        for found, wanted in zip(expected, sound, strict=True):
            assert torch.equal(found[1::2], wanted[1::2])
        assert_equal(numba_kernels.verify_tree(*arguments, **options), expected)
    if dtype == torch.float32 and rule in ("mixed", "rrs"):
        assert_equal(triton_on(device)(*arguments, **options), expected)
    if where == "target":
        first = expected.tokens[arguments[2].req_idx.argsort(), 0][::2].tolist()
        emitted = dict(zip(ODD_ROWS, first, strict=True))
        assert emitted["all NaN"] == emitted["all -inf"] == emitted["NaN and -inf"] == 0
        assert emitted["NaN, but for one"] == vocab_size - 1
        assert emitted["one +inf"] == 2
        assert emitted["two +inf"] in (1, 2)
        assert emitted["one NaN"] != 1


@pytest.mark.parametrize("rule", ["traversal", "rrsw", "match"])
def test_odd_rows_of_greedy_requests(device, rule):
    """The best token that is a number; token 0 where none is."""
    arguments, options = make_case(CHAIN, 70, rule, torch.float32, num_reqs=len(ODD_ROWS))
    target = arguments[0]
    target.temperature.zero_()
    for request, change in enumerate(ODD_ROWS.values()):
        change(target.logits[int(target.row_start[request])])
    rows = target.logits[target.row_start.long()]
    wanted = rows.nan_to_num(-3e38, 3e38, -3e38).clamp(-3e38, 3e38).argmax(dim=1)
    for verify in (verify_tree, numba_kernels.verify_tree, triton_on(device)):
        assert torch.equal(verify(*arguments, **options).tokens[:, 0], wanted)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_read(device, rule):
    """NaN in rows that no node verified needs changes nothing; a greedy request reads no draft, a
    tree of hubs neither."""
    tree = CHAIN if rule == "chain" else UNEQUAL
    arguments, options = make_case(tree, 63, rule, torch.float32)
    target, drafts, requests, _ = arguments
    verify = [verify_tree, numba_kernels.verify_tree]
    if rule in ("traversal", "rrs", "chain"):
        verify.append(triton_on(device))
    expected = verify_tree(*arguments, **options)
    for request, start in enumerate(target.row_start.tolist()):
        count = int(target.num_nodes[request]) + 1
        target.logits[start + count : start + len(tree.counts)] = float("nan")
        state = int(requests.req_idx[request])
        unread = drafts.sampled[state] == 0
        if target.temperature[state] == 0:
            unread = torch.ones_like(unread)
        drafts.logits[state, unread] = float("nan")
    for implementation in verify:
        assert_equal(implementation(*arguments, **options), expected)


@pytest.mark.parametrize("rule", ["rrsw", "traversal"])
def test_strides(device, rule):
    arguments, options = make_case(BINARY, 63, rule, torch.float32)
    expected = verify_tree(*arguments, **options)
    rows, (draft_logits, sampled) = arguments[0].logits, arguments[1]
    nan = float("nan")
    for verify, where in (
        (verify_tree, "cpu"),
        (numba_kernels.verify_tree, "cpu"),
        (kernel.verify_tree, device),
    ):
        strided = to(where, arguments)
        wide = torch.full((len(rows), 100), nan, device=where)
        strided[0] = strided[0]._replace(logits=wide[:, :63].copy_(rows))
        wide = torch.full((draft_logits.shape[0], 9, 80), nan, device=where)
        wide_bits = torch.full((sampled.shape[0], 11), -9, dtype=torch.int32, device=where)
        strided[1] = Drafts(wide[:, :7, :63].copy_(draft_logits), wide_bits[:, :7].copy_(sampled))
        found = verify(*strided, **options)
        assert_equal((value.cpu() for value in found), expected)


@pytest.mark.parametrize("rule", ["rrs", "traversal"])
def test_offsets_beyond_32_bits(device, rule):
    if device != "cpu":
        pytest.skip("needs memory that is reserved but not used")
    arguments, options = make_case(Tree([2, 0, 0]), 8, rule, torch.bfloat16)
    expected = verify_tree(*arguments, **options)
    target, drafts = arguments[:2]
    rows = huge_rows(len(target.logits), 2**28 + 16, 8).copy_(target.logits)
    arguments[0] = target._replace(logits=rows)
    draft_logits = huge_rows(7, 2**29 + 16, 8).unsqueeze(1)
    arguments[1] = drafts._replace(logits=draft_logits.copy_(drafts.logits))
    assert_equal(kernel.verify_tree(*arguments, **options), expected)


@pytest.mark.parametrize("rule", BRANCHING)
@pytest.mark.parametrize("name", ["binary", "unequal"])
def test_greedy_follows_the_argmax(name, rule):
    tree = TREES[name]
    arguments, options = make_case(tree, 30, rule, torch.bfloat16, num_reqs=21)
    arguments[0] = target = arguments[0]._replace(temperature=torch.zeros(21))
    tokens, num_emitted, path = verify_tree(*arguments, **options)
    for request in range(21):
        start, limit = int(target.row_start[request]), int(target.num_nodes[request])
        node, expected = 0, []
        while True:
            logits = target.logits[start + node].tolist()
            expected.append(logits.index(max(logits)))
            first = int(tree.first_child[node])
            children = range(first, first + tree.counts[node])
            if any(child > limit for child in children):
                break
            matching = [c for c in children if target.node_tokens[start + c] == expected[-1]]
            if not matching:
                break
            # of independent draws of one token the first is visited first
            node = matching[0]
        assert tokens[request, : len(expected)].tolist() == expected
        assert num_emitted[request] == len(expected)
        assert path[request, len(expected) - 1] == node


VOCAB_SIZE, LENGTH = 4, 3
HOST = {"reference": verify_tree, "numba": numba_kernels.verify_tree}


def run_markov(
    tree: Tree,
    rule: str,
    # [vocab_size, vocab_size]: next-token logits by token
    target: torch.Tensor,
    draft: torch.Tensor,
    count: int,
    draft_temperature: float = 1.0,
    num_nodes: int | None = None,
    sharpening: float = 1.0,
    verify=verify_tree,
) -> tuple[torch.Tensor, torch.Tensor, Draft]:
    """Speculate once for `count` seeds from token 0; distributions depend on the token before."""
    seeds = torch.arange(count)
    req_idx = torch.arange(count)
    positions = torch.full((count,), 9)
    temperature = torch.full((count,), draft_temperature)
    root = torch.zeros(count, dtype=torch.int64)
    drafted = draft_tree(
        tree,
        lambda path: draft[path[:, -1]],
        root,
        temperature,
        seeds,
        req_idx,
        positions,
        rule,
        sharpening,
    )
    num_rows = len(tree.counts)
    tokens, num_emitted, _ = verify(
        TargetRows(
            # Not yet divided by their temperature.
            0.5 * target[drafted.tokens].flatten(0, 1),
            torch.full((count,), 0.5),
            torch.arange(count, dtype=torch.int32) * num_rows,
            torch.full((count,), tree.num_drafted if num_nodes is None else num_nodes).int(),
            drafted.tokens.flatten(),
        ),
        Drafts(drafted.logits, drafted.sampled),
        Requests(req_idx.int(), positions, temperature, seeds),
        tree.tables,
        level_sizes=tree.level_sizes,
        rule=rule,
        sharpening=sharpening,
    )
    return tokens, num_emitted, drafted


def extend(tokens: torch.Tensor, num_emitted: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """[count, LENGTH]: the emitted tokens, continued by plain sampling from the target."""
    generator = torch.Generator().manual_seed(0)
    result = torch.zeros(len(tokens), LENGTH, dtype=torch.int64)
    last = torch.zeros(len(tokens), dtype=torch.int64)
    for position in range(LENGTH):
        plain = torch.multinomial(probs[last], 1, generator=generator).squeeze(1)
        if position < tokens.shape[1]:
            last = torch.where(position < num_emitted, tokens[:, position], plain)
        else:
            last = plain
        result[:, position] = last
    return result


def sequence_probs(probs: np.ndarray) -> np.ndarray:
    result = np.zeros((VOCAB_SIZE,) * LENGTH)
    for sequence in itertools.product(range(VOCAB_SIZE), repeat=LENGTH):
        result[sequence] = np.prod([probs[a, b] for a, b in itertools.pairwise((0, *sequence))])
    return result.flatten()


STATISTICAL_TREES = {
    "unequal": Tree([3, 2, 0, 0, 0, 0]),
    "chain": Tree([1, 1, 0]),
    "three": Tree([3, 3, 0, 1, 0, 0, 0, 0]),
    # One of node 2's children is cut: node 2 is a leaf.
    "truncated": Tree([2, 2, 2, 0, 0, 0, 0]),
}


LOSSLESS_CASES = [
    *(("three", rule, 1.0, 1.0) for rule in BRANCHING),
    *(("truncated", rule, 0.4, 1.0) for rule in BRANCHING),
    *((name, rule, 1.0, 1.0) for name in ("unequal", "chain") for rule in ("traversal", "mixed")),
    *(("unequal", rule, 0.0, 1.0) for rule in ("traversal", "rrs", "rrsw")),
    *(("three", rule, 1.0, 2.0) for rule in SPECHUB),
    ("chain", "chain", 1.0, 1.0),
]


@pytest.mark.parametrize("host", HOST)
@pytest.mark.parametrize(("name", "rule", "draft_temperature", "sharpening"), LOSSLESS_CASES)
def test_lossless(host, name, rule, draft_temperature, sharpening):
    """Three-token sequences follow the target; the first token is accepted at its known rate."""
    count = 20_000 if host == "numba" else 5_000
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=generator) * 1.2
    draft = target + torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=generator)
    draft[1, 2] = draft[1, 0]  # a tie
    draft[3] = -torch.inf  # nothing to draft from
    target[2, 3] = -torch.inf
    tree = STATISTICAL_TREES[name]
    num_nodes = 5 if name == "truncated" else None
    tokens, num_emitted, _ = run_markov(
        tree, rule, target, draft, count, draft_temperature, num_nodes, sharpening, HOST[host]
    )
    probs = torch.softmax(target.double(), dim=1)
    sequences = extend(tokens, num_emitted, probs)
    cells = sequences @ torch.tensor([VOCAB_SIZE**2, VOCAB_SIZE, 1])
    observed = np.bincount(cells.numpy(), minlength=VOCAB_SIZE**LENGTH)
    expected = sequence_probs(probs.numpy()) * count
    assert (observed[expected == 0] == 0).all()
    # Cells too rare for the test's approximation are joined.
    rare = expected < 10
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    assert stats.chisquare(observed, expected).pvalue > 1e-4

    if draft_temperature != 1.0:
        return
    p, q = (
        enumeration.normalised(torch.softmax(row[0].double(), 0).tolist())
        for row in (target, draft)
    )
    alpha = float(sum(accepted(p, q, tree.counts[0], DRAFTING[rule], int(sharpening))))
    found = int((num_emitted > 1).sum())
    # From leaf to root, what fails below the root's children is made good for.
    alternative = "less" if DRAFTING[rule].leaf_to_root else "two-sided"
    assert stats.binomtest(found, count, min(alpha, 1.0), alternative).pvalue > 1e-4


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "match"])
def test_equal_distributions_accept(rule):
    """An only child drafted from the target itself is accepted, but for rounding."""
    logits = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 3
    _, num_emitted, _ = run_markov(Tree([1, 1, 0]), rule, logits, logits, 5_000)
    assert (num_emitted == 3).float().mean() > 0.999


@pytest.mark.parametrize("rule", [rule for rule in BRANCHING if rule != "rrs"])
@pytest.mark.parametrize(
    "counts", [[2, 2, 2, 0, 0, 0, 0], [3, 2, 0, 1, 0, 0, 0], [2, 2, 0, 1, 0, 0]]
)
def test_reach_is_exact(rule, counts):
    """What every node of a drafted tree is reached with, against fractions; a draft per request."""
    tree, num_reqs = Tree(counts), 12
    model, drafting = Model(4, 3, special=0.2), DRAFTING[rule]
    source = random.Random(1)
    num_internal = int(tree.internal_index.max()) + 1
    logits = torch.zeros(num_reqs, num_internal, 4)
    bits = torch.zeros(num_reqs, num_internal, dtype=torch.int32)
    tokens = torch.zeros(num_reqs, len(counts), dtype=torch.int64)
    rows = torch.zeros(num_reqs, len(counts), 4)
    wanted = torch.ones(num_reqs, len(counts))

    def log(row) -> torch.Tensor:
        return torch.tensor([*map(float, row)]).log()

    for request in range(num_reqs):
        contexts, grown = {0: ()}, Grown({}, {}, {})
        for node, count in enumerate(counts):
            context = contexts[node]
            rows[request, node] = log(model.target(context))
            if not count:
                continue
            q, inner = model.draft(context), int(tree.internal_index[node])
            options = enumeration.drafts(q, count, drafting)
            (children,) = source.choices([c for _, c in options], [float(x) for x, _ in options])
            grown.children[context], grown.hubs[context] = children, frozenset()
            logits[request, inner] = log(q)
            for slot, child in enumerate(children):
                at = int(tree.first_child[node]) + slot
                contexts[at], tokens[request, at] = (*context, child.token), child.token
                bits[request, inner] |= child.sampled << slot
        emitted = enumeration.verify(model, [(1, grown)], drafting.leaf_to_root)
        for node, context in contexts.items():
            size = len(context)
            longer = [x for s, x in emitted.items() if s[:size] == context and len(s) > size]
            wanted[request, node] = float(sum(longer))
    everyone = torch.arange(num_reqs)
    found = reach(
        TargetRows(
            rows.flatten(0, 1),
            torch.ones(num_reqs),
            everyone.int() * len(counts),
            torch.full((num_reqs,), tree.num_drafted).int(),
            tokens.flatten(),
        ),
        Drafts(logits, bits),
        Requests(everyone, everyone, torch.ones(num_reqs), everyone),
        tree.tables,
        rule=rule,
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("implementation", ["reference", "numba", "triton"])
@pytest.mark.parametrize("rule", RULES)
def test_ruled_out_tokens_are_never_emitted(device, implementation, rule):
    """The target is certain; the draft too in float32, but its improbable child gets drafted."""
    vocab_size, count = 8, 16
    rows = torch.full((count * 2, vocab_size), -torch.inf)
    rows[:, 3] = 0.0
    draft_logits = torch.full((count, 1, vocab_size), -30.0)
    draft_logits[:, 0, 3] = 0.0
    arguments = [
        TargetRows(
            rows,
            torch.ones(count),
            torch.arange(count, dtype=torch.int32) * 2,
            torch.ones(count, dtype=torch.int32),
            torch.full((count * 2,), 5),
        ),
        Drafts(draft_logits, torch.ones(count, 1, dtype=torch.int32)),
        Requests(
            torch.arange(count, dtype=torch.int32),
            torch.zeros(count, dtype=torch.int64),
            torch.ones(count),
            torch.arange(count),
        ),
        Tree([1, 0]).tables,
    ]
    verify = triton_on(device) if implementation == "triton" else HOST[implementation]
    tokens, num_emitted, _ = verify(*arguments, level_sizes=[1, 1], rule=rule)
    assert (tokens[:, 0] == 3).all()
    assert (num_emitted == 1).all()


NAMES = [
    (place, name)
    for place, kind in enumerate((TargetRows, Drafts, Requests, TreeTables))
    for name in kind._fields
]


@pytest.mark.parametrize(
    ("place", "name"),
    [(place, name) for place, name in NAMES if name not in ("row_start", "drawn")],
)
def test_wrong_shapes_are_named(place, name):
    arguments, options = make_case(CHAIN, 9, "unordered", torch.float32)
    value = getattr(arguments[place], name)
    arguments[place] = arguments[place]._replace(**{name: value[..., :-1]})
    # These two set the length that others are compared with.
    message = {"temperature": "requests.temperature", "first_child": "num_children"}
    with pytest.raises(ValueError, match=message.get(name, name)):
        verify_tree(*arguments, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "maybe"}, "rule is 'maybe', allowed: traversal"),
        ({"sharpening": 0.0}, "sharpening is 0.0"),
        ({"rule": "rrs", "sharpening": 2.0}, "sharpening must be 1 with rule 'rrs'"),
    ],
)
def test_wrong_rules_are_named(change, message):
    arguments, options = make_case(CHAIN, 9, "unordered", torch.float32)
    with pytest.raises(ValueError, match=message):
        verify_tree(*arguments, **(options | change))


@pytest.mark.parametrize("rule", ["traversal", "ordered"])
def test_no_requests(device, rule):
    arguments, options = make_case(CHAIN, 9, rule, torch.float32)
    target, _, requests, _ = arguments
    arguments[0] = target._replace(row_start=target.row_start[:0], num_nodes=target.num_nodes[:0])
    arguments[2] = requests.rows(torch.arange(0))
    for verify in (verify_tree, numba_kernels.verify_tree, triton_on(device)):
        tokens, num_emitted, path = verify(*arguments, **options)
        assert tokens.shape == path.shape == (0, 5)
        assert num_emitted.shape == (0,)
