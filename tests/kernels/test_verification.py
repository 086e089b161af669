# SPDX-License-Identifier: Apache-2.0
"""Tree verification: kernel against reference, greedy walks, and losslessness by sampling."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from helpers.drafting import BINARY, CHAIN, UNEQUAL, WIDE, Draft, Tree, draft_tree, huge_rows
from helpers.enumeration import enumerate_drafts, laws_of
from vllm_spechub.triton_kernels import rng
from vllm_spechub.triton_kernels.arguments import Drafts, Requests, TargetRows, TreeTables
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES
from vllm_spechub.triton_kernels.verification import kernel, reference, verify_tree
from vllm_spechub.triton_kernels.verification.node_rules import node_outcome

RULES = tuple(BUILTIN_RULES)
SPECHUB = tuple(name for name, rule in BUILTIN_RULES.items() if rule.sharpens)

TREES = {"binary": BINARY, "unequal": UNEQUAL, "chain": CHAIN, "wide": WIDE}
TARGET_TEMPERATURES = [1.0, 0.0, 1.0, 0.5, 1.0, 0.0, 0.02]
DRAFT_TEMPERATURES = [1.0, 1.0, 0.0, 0.5, 0.3, 0.0, 0.02]


def on(device: str, arguments: list) -> list:
    return [value._make(field.to(device) for field in value) for value in arguments]


def make_case(
    tree: Tree,
    vocab_size: int,
    rule: str,
    dtype: torch.dtype,
    num_reqs: int = 7,
    sharpening: float = 1.0,
) -> tuple[list, dict]:
    """Arguments with every temperature, ties, masked tokens, masked rows, and truncated trees."""
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
    draft_logits[4, :, 0] += 100.0  # hub mass of 1 in float32
    target_logits[4, :, 0] += 100.0
    draft_logits, target_logits = draft_logits.to(dtype), target_logits.to(dtype)

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
        Drafts(draft.logits, draft.sample_slots),
        Requests(
            req_idx.int(),
            torch.arange(num_reqs) + 50,
            torch.tensor(DRAFT_TEMPERATURES).repeat(num_reqs // 7 + 1)[:num_reqs],
            torch.arange(num_reqs) * 1000 - 3,
        ),
        tree.tables,
    ]
    options = {"max_depth": tree.max_depth, "rule": rule, "sharpening": sharpening}
    return arguments, options


def assert_equal(actual, expected) -> None:
    for value, wanted in zip(actual, expected, strict=True):
        assert value.dtype == wanted.dtype
        assert torch.equal(value.cpu(), wanted)


SIZES = [
    (6, 16, torch.float32),
    (63, 16, torch.float16),
    (500, 128, torch.bfloat16),
    (1030, 2048, torch.float32),
]
BRANCHING_RULES = RULES[:-1]
KERNEL_CASES = [
    *(("unequal", rule, 1.0, *sizes) for rule in BRANCHING_RULES for sizes in SIZES),
    *((name, rule, 1.0, *SIZES[1]) for name in ("binary", "wide") for rule in BRANCHING_RULES),
    *(("chain", rule, 1.0, *SIZES[2]) for rule in RULES),
    *(("unequal", rule, 2.5, *SIZES[1]) for rule in SPECHUB),
    *(("binary", rule, 0.5, *SIZES[2]) for rule in SPECHUB),
]


@pytest.mark.parametrize(
    ("name", "rule", "sharpening", "vocab_size", "lanes", "dtype"), KERNEL_CASES
)
def test_kernel_equals_reference(
    monkeypatch, device, name, rule, sharpening, vocab_size, lanes, dtype
):
    monkeypatch.setattr(rng, "LANES", lanes)
    arguments, options = make_case(TREES[name], vocab_size, rule, dtype, sharpening=sharpening)
    expected = verify_tree(*arguments, **options)
    assert_equal(kernel.verify_tree(*on(device, arguments), **options), expected)
    tokens, num_emitted, path = expected
    # Some walk, so that more than the root is compared.
    assert num_emitted.max() > 1
    for request in range(len(tokens)):
        count = int(num_emitted[request])
        emitted = tokens[request, :count]
        assert ((emitted >= 0) & (emitted < vocab_size)).all()
        assert (emitted != vocab_size // 2).all()  # masked in the target
        assert (tokens[request, count:] == -1).all()
        assert (path[request, count:] == -1).all()
        start = int(arguments[0].row_start[request])
        walked = path[request, :count].long()
        assert walked[0] == 0
        assert torch.equal(arguments[0].node_tokens[start + walked[1:]], emitted[:-1])
        assert (walked <= arguments[0].num_nodes[request]).all()


@pytest.mark.parametrize("tree", [Tree([2, 2, 2, 0, 0, 0, 0]), Tree([2, 2, 2, 1, 0, 0, 0, 0])])
def test_traversal_tells_subtrees_apart(monkeypatch, device, tree):
    """Many requests, so that the two ways to emit a node's masses differ in some."""
    monkeypatch.setattr(rng, "LANES", 8)
    arguments, options = make_case(tree, 6, "traversal", torch.float32, num_reqs=35)
    expected = verify_tree(*arguments, **options)
    assert_equal(kernel.verify_tree(*on(device, arguments), **options), expected)


@pytest.mark.parametrize("rule", ["ordered", "traversal"])
def test_rejections_of_many_requests(monkeypatch, device, rule):
    """Targets that differ from the draft, so that walks end in residuals all over the tree."""
    monkeypatch.setattr(rng, "LANES", 32)
    arguments, options = make_case(UNEQUAL, 20, rule, torch.float32, num_reqs=28)
    arguments[0].logits.add_(2 * torch.randn(20, generator=torch.Generator().manual_seed(5)))
    expected = verify_tree(*arguments, **options)
    ends = {int(path[path >= 0].max()) for path in expected[2]}
    assert len(ends & set(torch.nonzero(UNEQUAL.num_children).flatten().tolist())) > 2
    assert_equal(kernel.verify_tree(*on(device, arguments), **options), expected)


@pytest.mark.parametrize("rule", RULES)
def test_only_visited_rows_are_read(device, rule):
    """NaN in every other row changes nothing; a greedy request reads no draft row at all."""
    tree = CHAIN if rule == "chain" else UNEQUAL
    arguments, options = make_case(tree, 63, rule, torch.float32, num_reqs=21)
    visited = torch.empty(21, len(tree.counts), dtype=torch.bool)
    expected = reference.verify_tree(*arguments, **options, visited=visited)
    _, num_emitted, path = expected
    assert visited.gather(1, path.clamp(min=0).long()).all()
    assert (visited.sum(dim=1) >= num_emitted).all()
    internal = tree.internal_index >= 0
    num_read = 0
    for request, start in enumerate(arguments[0].row_start.tolist()):
        arguments[0].logits[start : start + len(tree.counts)][~visited[request]] = float("nan")
        state = int(arguments[2].req_idx[request])
        drafts = visited[request, internal] & (arguments[0].temperature[state] > 0)
        arguments[1].logits[state, ~drafts] = float("nan")
        num_read += int(drafts.sum())
    assert 0 < num_read < 21 * int(internal.sum())
    assert_equal(kernel.verify_tree(*on(device, arguments), **options), expected)


@pytest.mark.parametrize("rule", ["ordered", "rrsw", "traversal"])
def test_strides(device, rule):
    arguments, options = make_case(BINARY, 63, rule, torch.float32)
    expected = verify_tree(*arguments, **options)
    rows, (draft_logits, slots) = arguments[0].logits, arguments[1]
    nan = float("nan")
    for implementation, where in ((verify_tree, "cpu"), (kernel.verify_tree, device)):
        strided = on(where, arguments)
        wide = torch.full((len(rows), 100), nan, device=where)
        strided[0] = strided[0]._replace(logits=wide[:, :63].copy_(rows))
        wide = torch.full((draft_logits.shape[0], 9, 80), nan, device=where)
        wide_slots = torch.full((slots.shape[0], 11), -9, dtype=torch.int32, device=where)
        strided[1] = Drafts(wide[:, :7, :63].copy_(draft_logits), wide_slots[:, :7].copy_(slots))
        assert_equal(implementation(*strided, **options), expected)


@pytest.mark.parametrize("rule", ["ordered", "rrs", "traversal"])
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


@pytest.mark.parametrize("rule", BRANCHING_RULES)
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
            node = matching[0]
        assert tokens[request, : len(expected)].tolist() == expected
        assert num_emitted[request] == len(expected)
        assert path[request, len(expected) - 1] == node


VOCAB_SIZE, LENGTH = 4, 3


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
) -> tuple[torch.Tensor, torch.Tensor, Draft]:
    """Speculate once for `count` seeds from token 0; the laws depend on the token before."""
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
    tokens, num_emitted, _ = verify_tree(
        TargetRows(
            # Not yet divided by their temperature.
            0.5 * target[drafted.tokens].flatten(0, 1),
            torch.full((count,), 0.5),
            torch.arange(count, dtype=torch.int32) * num_rows,
            torch.full((count,), tree.num_drafted if num_nodes is None else num_nodes).int(),
            drafted.tokens.flatten(),
        ),
        Drafts(drafted.logits, drafted.sample_slots),
        Requests(req_idx.int(), positions, temperature, seeds),
        tree.tables,
        max_depth=tree.max_depth,
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


def sequence_law(probs: np.ndarray) -> np.ndarray:
    law = np.zeros((VOCAB_SIZE,) * LENGTH)
    for sequence in itertools.product(range(VOCAB_SIZE), repeat=LENGTH):
        law[sequence] = np.prod([probs[a, b] for a, b in itertools.pairwise((0, *sequence))])
    return law.flatten()


STATISTICAL_TREES = {
    "binary": Tree([2, 2, 2, 0, 0, 0, 0]),
    "unequal": Tree([3, 2, 0, 0, 0, 0]),
    "chain": Tree([1, 1, 0]),
    "three": Tree([3, 3, 0, 1, 0, 0, 0, 0]),
    # One of node 2's children is cut: node 2 is a leaf.
    "truncated": Tree([2, 2, 2, 0, 0, 0, 0]),
}


LOSSLESS_CASES = [
    *itertools.product(STATISTICAL_TREES, BRANCHING_RULES, [1.0, 0.4], [1.0]),
    *(("three", rule, 0.0, 1.0) for rule in BRANCHING_RULES),
    *(("three", rule, 1.0, 2.5) for rule in SPECHUB),
    ("chain", "chain", 1.0, 1.0),
]


@pytest.mark.parametrize(("name", "rule", "draft_temperature", "sharpening"), LOSSLESS_CASES)
def test_lossless(name, rule, draft_temperature, sharpening):
    """Three-token sequences follow the target; the first token is accepted at its known rate."""
    count = 20_000
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=generator) * 1.2
    draft = target + torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=generator)
    draft[1, 2] = draft[1, 0]  # a tie
    draft[3] = -torch.inf  # nothing to draft from
    target[2, 3] = -torch.inf
    tree = STATISTICAL_TREES[name]
    num_nodes = 5 if name == "truncated" else None
    tokens, num_emitted, _ = run_markov(
        tree, rule, target, draft, count, draft_temperature, num_nodes, sharpening
    )
    probs = torch.softmax(target.double(), dim=1)
    sequences = extend(tokens, num_emitted, probs)
    cells = sequences @ torch.tensor([VOCAB_SIZE**2, VOCAB_SIZE, 1])
    observed = np.bincount(cells.numpy(), minlength=VOCAB_SIZE**LENGTH)
    expected = sequence_law(probs.numpy()) * count
    assert (observed[expected == 0] == 0).all()
    # Cells too rare for the test's approximation are joined.
    rare = expected < 10
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    assert stats.chisquare(observed, expected).pvalue > 1e-4

    p = probs[0].numpy()
    q = torch.softmax(draft[0].double() / (draft_temperature or 1.0), dim=0).numpy()
    drafts = enumerate_drafts(q, tree.counts[0], rule, draft_temperature == 0, sharpening)
    law = laws_of(q, drafts, rule, draft_temperature == 0, sharpening)
    rows = torch.from_numpy(p).expand(len(drafts.prob), -1)
    outcome = node_outcome(rows, law, drafts.children, drafts.sample_slot, rule=rule)
    alpha = (drafts.prob * outcome.accept.sum(dim=1)).sum().item()
    accepted = int((num_emitted > 1).sum())
    # Traversal makes good for what fails below the root's children.
    alternative = "less" if rule == "traversal" else "two-sided"
    assert stats.binomtest(accepted, count, min(alpha, 1.0), alternative).pvalue > 1e-4


@pytest.mark.parametrize("rule", RULES)
def test_equal_laws_accept(rule):
    """An only child drafted from the target's own law is accepted, but for rounding."""
    logits = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 3
    _, num_emitted, _ = run_markov(Tree([1, 1, 0]), rule, logits, logits, 5_000)
    assert (num_emitted == 3).float().mean() > 0.999


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize("rule", RULES)
def test_ruled_out_tokens_are_never_emitted(device, implementation, rule):
    """The target is certain; the draft too in float32, but its improbable child gets drafted."""
    vocab_size, count = 8, 32
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
        Drafts(draft_logits, torch.zeros(count, 1, dtype=torch.int32)),
        Requests(
            torch.arange(count, dtype=torch.int32),
            torch.zeros(count, dtype=torch.int64),
            torch.ones(count),
            torch.arange(count),
        ),
        Tree([1, 0]).tables,
    ]
    if implementation == "kernel":
        tokens, num_emitted, _ = kernel.verify_tree(*on(device, arguments), max_depth=1, rule=rule)
    else:
        tokens, num_emitted, _ = verify_tree(*arguments, max_depth=1, rule=rule)
    assert (tokens[:, 0] == 3).all()
    assert (num_emitted == 1).all()


NAMES = [
    (place, name)
    for place, kind in enumerate((TargetRows, Drafts, Requests, TreeTables))
    for name in kind._fields
]


@pytest.mark.parametrize(
    ("place", "name"), [(place, name) for place, name in NAMES if name != "row_start"]
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
        ({"rule": "maybe"}, "rule is 'maybe', allowed: ordered"),
        ({"sharpening": 0.0}, "sharpening is 0.0"),
        ({"rule": "rrs", "sharpening": 2.0}, "sharpening must be 1 with rule 'rrs'"),
    ],
)
def test_wrong_rules_are_named(change, message):
    arguments, options = make_case(CHAIN, 9, "unordered", torch.float32)
    with pytest.raises(ValueError, match=message):
        verify_tree(*arguments, **(options | change))


@pytest.mark.parametrize("rule", RULES)
def test_no_requests(device, rule):
    arguments, options = make_case(CHAIN, 9, rule, torch.float32)
    target, _, requests, _ = arguments
    arguments[0] = target._replace(row_start=target.row_start[:0], num_nodes=target.num_nodes[:0])
    arguments[2] = requests.rows(torch.arange(0))
    for implementation, where in ((verify_tree, "cpu"), (kernel.verify_tree, device)):
        tokens, num_emitted, path = implementation(*on(where, arguments), **options)
        assert tokens.shape == path.shape == (0, 5)
        assert num_emitted.shape == (0,)
