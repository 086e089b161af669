# SPDX-License-Identifier: Apache-2.0
"""The engine-free library: what it emits follows the target, and what it refuses it names."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from vllm_spechub import TokenTree, acceptance, draft_tree, otm, verify_tree
from vllm_spechub.rules.optimum import draft_sets
from vllm_spechub.trees.level_tree import LevelTree
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES
from vllm_spechub.triton_kernels.verification.node import node_outcome

RULES = tuple(BUILTIN_RULES)
SHARPENED = ("traversal", "mixed", "ordered", "unordered")
# of one sample at most: no verification accepts more of such drafts
OPTIMAL = ("traversal", "ordered", "unordered", "chain", "match")

VOCAB = 4
# Unequal subtrees, up to three children, a leaf beside each inner node.
TREE = TokenTree((0, 0, 1, 1, 1, 2))
CHAIN = TokenTree.chain(2)


def markov(seed: int) -> torch.Tensor:
    """Distributions of the next token after any two tokens, with some zeros. [VOCAB + 1, VOCAB + 1,
    VOCAB]"""
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(VOCAB + 1, VOCAB + 1, VOCAB, generator=generator).pow(3)
    table[:, ::2, seed % VOCAB] = 0.0
    return table / table.sum(dim=-1, keepdim=True)


def after(table: torch.Tensor, prefixes: torch.Tensor) -> torch.Tensor:
    """The table's rows after prefixes [batch_size, t]; VOCAB stands for no token."""
    padded = torch.nn.functional.pad(prefixes, (2, 0), value=VOCAB)
    return table[padded[:, -2], padded[:, -1]]


def target_rows(tree: TokenTree, table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    paths = [[node - 1 for node in path[1:]] for path in tree.paths]
    return torch.stack([after(table, tokens[:, path]) for path in paths], dim=1)


def completed(tokens: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Emitted tokens, continued from the target to their full width."""
    tokens = tokens.clone()
    for column in range(tokens.shape[1]):
        probs = after(table, tokens[:, :column])
        drawn = probs.multinomial(1).squeeze(1)
        tokens[:, column] = torch.where(tokens[:, column] < 0, drawn, tokens[:, column])
    return tokens


def p_value(tokens: torch.Tensor, table: torch.Tensor) -> float:
    """Chi-square of all emitted sequences of one width against the target's distribution."""
    width = tokens.shape[1]
    sequences = torch.tensor(list(itertools.product(range(VOCAB), repeat=width)))
    expected = torch.ones(len(sequences), dtype=torch.float64)
    for column in range(width):
        probs = after(table, sequences[:, :column]).double()
        expected *= probs.gather(1, sequences[:, column : column + 1]).squeeze(1)
    weights = VOCAB ** torch.arange(width - 1, -1, -1)
    found = torch.bincount((tokens * weights).sum(dim=1), minlength=len(sequences))
    if found[expected == 0].any():
        return 0.0
    expected = expected * len(tokens)
    rare = expected < 5
    expected, found = (torch.cat([v[~rare], v[rare].sum().view(1)]) for v in (expected, found))
    expected, found = expected[expected > 0], found[expected > 0]
    return float(chi2.sf(((found - expected) ** 2 / expected).sum().item(), len(expected) - 1))


@pytest.mark.parametrize(
    ("rule", "sharpening"),
    [*((rule, 1.0) for rule in RULES), ("traversal", 1.7), ("mixed", 1.4), ("ordered", 0.6)],
)
def test_emitted_tokens_follow_the_target(rule, sharpening):
    draft_table, target_table = markov(1), markov(2)
    tree = CHAIN if rule == "chain" else TREE
    generator = torch.Generator().manual_seed(7)
    torch.manual_seed(7)
    draft = draft_tree(
        tree,
        lambda prefixes: after(draft_table, prefixes),
        30000,
        rule=rule,
        generator=generator,
        sharpening=sharpening,
    )
    assert draft.tokens.shape == (30000, tree.num_nodes)
    rows = target_rows(tree, target_table, draft.tokens)
    tokens, num_tokens = verify_tree(draft, rows, rule=rule, generator=generator)
    assert tokens.shape == (30000, tree.depth + 1)
    assert ((tokens >= 0).sum(dim=1) == num_tokens).all()
    assert (tokens.gather(1, num_tokens.unsqueeze(1) - 1) >= 0).all()
    assert num_tokens.unique().tolist() == [1, 2, 3]
    assert p_value(completed(tokens, target_table), target_table) > 1e-3
    # The same test tells the draft's distribution from the target's.
    assert p_value(completed(tokens, target_table), markov(3)) < 1e-6


@pytest.mark.parametrize("rule", ["mixed", "traversal", "unordered"])
def test_level_widths_follow_the_target(rule):
    """Every sequence's tree is its own, and each node's prefix is its own path."""
    draft_table, target_table = markov(1), markov(2)
    generator = torch.Generator().manual_seed(5)
    draft = draft_tree(
        LevelTree((3, 4)),
        lambda prefixes: after(draft_table, prefixes),
        20000,
        rule=rule,
        generator=generator,
    )
    trees = [draft.tree_of(sequence) for sequence in range(20000)]
    rows = torch.empty(20000, 8, VOCAB)
    assert len(set(trees)) > (rule == "mixed")
    for tree in set(trees):
        own = torch.tensor([other == tree for other in trees])
        rows[own] = target_rows(tree, target_table, draft.tokens[own])
    tokens, num_tokens = verify_tree(draft, rows, generator=generator)
    assert num_tokens.unique().tolist() == [1, 2, 3]
    assert p_value(completed(tokens, target_table), target_table) > 1e-3
    assert p_value(completed(tokens, target_table), markov(3)) < 1e-6


def test_equal_generators_give_equal_trees_and_sharing_one_is_safe():
    table = markov(1)

    def run(seed: int):
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        draft = draft_tree(TREE, lambda t: after(table, t), 200, generator=generators[0])
        rows = target_rows(TREE, markov(2), draft.tokens)
        return draft.tokens, *verify_tree(draft, rows, generator=generators[1])

    first, second, third = run(3), run(3), run(4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], third[0])


def test_prefixes_are_the_tokens_on_the_way():
    seen = []

    def probs(prefixes):
        seen.append(prefixes)
        return torch.full((len(prefixes), VOCAB), 1 / VOCAB, dtype=torch.bfloat16)

    draft = draft_tree(TREE, probs, 3, generator=torch.Generator().manual_seed(0))
    assert [prefixes.shape for prefixes in seen] == [(3, 0), (3, 1), (3, 1)]
    assert torch.equal(seen[1][:, 0], draft.tokens[:, 0])
    assert torch.equal(seen[2][:, 0], draft.tokens[:, 1])


@pytest.mark.parametrize(
    ("rule", "where_confident", "where_flat"),
    [
        ("traversal", 0b100, 0b001),
        ("ordered", 0b100, 0b001),
        ("mixed", 0b110, 0b101),
        ("unordered", 0b100, 0b100),
        ("rrs", 0b111, 0b111),
        ("rrsw", 0b111, 0b111),
        ("match", 0b000, 0b000),
    ],
)
def test_slots_are_known_before_anything_is_drawn(rule, where_confident, where_flat):
    """Which slots hold samples, and which tokens are hubs, follows from q alone. Expected
    acceptances: hubs .6 and .2 against .18 (`mixed`: .6 against .33 and .04) where q is confident,
    .22 and .2 against .43 (.22 against .51 and .09) where it is flat."""
    for probs, bits in (
        ([0.6, 0.2, 0.1, 0.05, 0.05], where_confident),
        ([0.22, 0.2, 0.2, 0.19, 0.19], where_flat),
    ):
        q = torch.tensor(probs)
        draft = draft_tree(
            TokenTree.complete(3, 1),
            lambda prefixes, q=q: q.expand(len(prefixes), -1),
            300,
            rule=rule,
        )
        assert draft.sampled.unique().tolist() == [bits]
        for slot in range(3):
            drawn = bits >> slot & 1
            assert (len(draft.tokens[:, slot].unique()) > 1) == bool(drawn)


def test_a_draft_that_is_the_target_is_accepted_whole():
    table = markov(1)
    draft = draft_tree(CHAIN, lambda t: after(table, t), 500, rule="chain")
    _, num_tokens = verify_tree(draft, target_rows(CHAIN, table, draft.tokens))
    assert num_tokens.unique().tolist() == [CHAIN.depth + 1]


def test_without_vllm():
    """In a process where importing vLLM fails."""
    program = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "vllm":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
import torch, vllm_spechub
from vllm_spechub import TokenTree, acceptance, draft_tree, verify_tree
tree = TokenTree.complete(branching=2, depth=2)
q = torch.tensor([[0.5, 0.3, 0.2]])
draft = draft_tree(tree, lambda prefixes: q.expand(len(prefixes), -1), 2, rule="traversal")
tokens, num_tokens = verify_tree(draft, q.expand(2, 7, 3), rule="traversal")
print(tuple(tokens.shape), acceptance(q, q, 2, "ordered").node.shape, "vllm" in sys.modules)
import vllm_spechub.cli, vllm_spechub.offline.simulation.study
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 3) torch.Size([1]) False"


UNIFORM = torch.full((2, VOCAB), 1 / VOCAB)
BAD_ROWS = [
    (UNIFORM * 1.1, "do not sum to 1"),
    (UNIFORM.clone().index_fill_(1, torch.tensor([1]), float("nan")), "NaN"),
    (UNIFORM.long(), "floating-point"),
    (UNIFORM[:1], r"must be \[2"),
    (UNIFORM[0], r"must be \[2"),
    (torch.tensor([[1.5, -0.5, 0.0, 0.0]] * 2), "negative"),
]


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS)
def test_bad_draft_rows(rows, message):
    with pytest.raises(ValueError, match=rf"draft_probs_fn's result .*{message}"):
        draft_tree(TREE, lambda _: rows, 2)


@pytest.mark.parametrize(("rows", "message"), [row for row in BAD_ROWS if row[0].dim() == 2])
def test_bad_target_rows(rows, message):
    draft = draft_tree(CHAIN, lambda _: UNIFORM, 2)
    rows = rows.unsqueeze(1).expand(-1, 3, -1)
    with pytest.raises(ValueError, match=rf"target_probs .*{message}"):
        verify_tree(draft, rows)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: draft_tree(TREE, lambda _: UNIFORM, 2, rule="best"), "rule is 'best', allowed"),
        (lambda d: draft_tree(TREE, lambda _: UNIFORM, 2, rule="chain"), "rule 'chain' takes one"),
        (lambda d: draft_tree([0, 0], lambda _: UNIFORM, 2), "tree must be a TokenTree"),
        (lambda d: draft_tree(TREE, lambda _: UNIFORM, 0), "batch_size must be"),
        (lambda d: draft_tree(TREE, lambda _: UNIFORM, 2, rule="rrs", sharpening=2.0), "sharpenin"),
        (lambda d: draft_tree(TREE, lambda _: UNIFORM, 2, sharpening=0.0), "sharpening is 0.0"),
        (lambda d: draft_tree(TREE, lambda _: torch.ones(2, 1), 2), "at least 3 tokens"),
        (lambda d: verify_tree(d, ROWS, rule="best"), "rule is 'best', allowed"),
        (lambda d: verify_tree(d, ROWS, rule="rrs"), "rule is 'rrs', but draft was drafted by"),
        (lambda d: verify_tree(d, ROWS, backend="numpy"), "backend must be 'torch' or 'triton'"),
        (lambda d: verify_tree(d, ROWS, backend="triton"), "backend 'triton' needs CUDA tensors"),
        (lambda d: verify_tree(d, ROWS[:, :-1]), "target_probs must be"),
        (lambda d: verify_tree(d.tokens, ROWS), "draft must be a DraftTree"),
    ],
)
def test_refusals_name_the_argument(call, message):
    draft = draft_tree(CHAIN, lambda _: UNIFORM, 2)
    with pytest.raises(ValueError, match=message):
        call(draft)


ROWS = torch.full((2, 3, VOCAB), 1 / VOCAB)


# One node ---------------------------------------------------------------------------------------


def distributions(size: int):
    """Distributions with zeros, ties and near-certain tokens."""
    weight = st.sampled_from([0.0, 1e-6, 0.1, 0.1, 0.3, 1.0, 4.0, 1e4])
    weights = st.lists(weight, min_size=size, max_size=size).filter(lambda w: sum(w) > 0)
    return weights.map(lambda w: np.array(w) / sum(w))


SOLVER_TOLERANCE = 1e-6  # of the linear program's constraints, 1e-7 each


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_acceptance_against_the_linear_program(data):
    size = data.draw(st.integers(2, 5))
    k = data.draw(st.integers(1, min(size, 4)))
    p, q = data.draw(distributions(size)), data.draw(distributions(size))
    for rule in RULES:
        if rule == "chain" and k > 1:
            continue
        node, slots = acceptance(torch.tensor(p), torch.tensor(q), k, rule)
        optimum = otm(p, q, k, rule)
        assert node.item() <= optimum + SOLVER_TOLERANCE, rule
        assert abs(slots.sum().item() - node.item()) < 1e-9
        if rule in OPTIMAL:
            assert abs(node.item() - optimum) < SOLVER_TOLERANCE, rule


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_optimum_of_improbable_drafts(k):
    """Where 1 - q has lost its digits, and q = 0.2, which would be a hub in float32."""
    p, q = [0.0, 0.0, 0.0, 1.0], [0.0, 1e-10, 1e-10, 1.0 - 2e-10]
    assert abs(otm(p, q, k, "rrsw") - (1.0 - 2e-10 if k == 1 else 1.0)) < 1e-9
    assert sum(draft_sets(q, k, "rrsw").values()) == pytest.approx(1.0, abs=1e-12)
    assert len(draft_sets([0.2, 2 / 3, 1 / 15, 1 / 15], 3, "mixed")) == 3


def accepted_by_slot(draft, p: torch.Tensor) -> torch.Tensor:
    """What each leaf below the root is accepted with, given its draft: samples are visited before
    hubs. [batch_size, num_children]"""
    slots = torch.arange(draft.tree.num_nodes)
    sampled = (draft.sampled >> slots) % 2 == 1
    visit = node_outcome(
        p.expand(draft.batch_size, -1),
        draft.logits[:, 0] * draft.sharpening,
        draft.tokens,
        sampled,
        torch.ones(draft.batch_size),
        replaced=draft.rule == "rrs",
    ).visit
    turn = torch.where(sampled, slots, slots + len(slots))
    before = turn.unsqueeze(1) < turn.unsqueeze(2)
    failed = torch.where(before, 1.0 - visit.unsqueeze(1), 1.0).prod(dim=2)
    return visit * failed


@pytest.mark.parametrize(
    ("rule", "sharpening"), [*((rule, 1.0) for rule in RULES), *((rule, 1.6) for rule in SHARPENED)]
)
def test_acceptance_by_slot_is_what_verification_does(rule, sharpening):
    generator = torch.Generator().manual_seed(5)
    num_drafts = 20000
    for k in [1] if rule == "chain" else [1, 2, 3, 4]:
        p, q = (torch.rand(6, generator=generator).pow(2) for _ in range(2))
        p, q = p / p.sum(), q / q.sum()
        draft = draft_tree(
            TokenTree.complete(k, 1),
            lambda prefixes, q=q: q.expand(len(prefixes), -1),
            num_drafts,
            rule=rule,
            generator=generator,
            sharpening=sharpening,
        )
        found = accepted_by_slot(draft, p)
        expected = acceptance(p, q, k, rule, sharpening=sharpening)
        error = found.std(dim=0) / num_drafts**0.5
        assert ((found.mean(dim=0) - expected.slots).abs() < 5 * error + 1e-6).all(), (rule, k)


def recursive_slots(p: np.ndarray, q: np.ndarray, k: int) -> np.ndarray:
    """Sampling without replacement by its definition: all sequences of rejected tokens."""
    slots = np.zeros(k)

    def go(p, taken, slot, weight):
        left = np.where(np.isin(np.arange(len(q)), taken), 0.0, q)
        left /= left.sum()
        residual = np.maximum(p - left, 0)
        for x in np.flatnonzero(left):
            accepted = min(1.0, p[x] / left[x])
            slots[slot] += weight * left[x] * accepted
            if accepted < 1 and slot + 1 < k:
                rest = weight * left[x] * (1 - accepted)
                go(residual / residual.sum(), [*taken, x], slot + 1, rest)

    go(p, [], 0, 1.0)
    return slots


def test_sampling_without_replacement_by_its_definition():
    random = np.random.default_rng(0)
    for size, k in itertools.product((4, 6), (1, 2, 3, 4)):
        p, q = random.dirichlet(np.ones(size) / 2, 2)
        found = acceptance(torch.tensor(p), torch.tensor(q), k, "rrsw").slots.numpy()
        np.testing.assert_allclose(found, recursive_slots(p, q, k), atol=1e-9)


def test_acceptance_is_batched():
    p, q = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0)).softmax(-1).unbind()
    for rule in (rule for rule in RULES if rule != "chain"):
        node, slots = acceptance(p, q, 2, rule)
        assert (node.shape, slots.shape) == ((3,), (3, 2))
        assert torch.allclose(node[1], acceptance(p[1], q[1], 2, rule).node)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ROWS[0], ROWS[0], 5, "ordered"), r"k must be in 1\.\.4"),
        ((ROWS[0], ROWS[0], 2, "chain"), r"k must be in 1\.\.1"),
        ((ROWS[0], ROWS[0], 2, "best"), "rule is 'best'"),
        ((ROWS[0] * 2, ROWS[0], 2, "rrs"), "p has rows that do not sum"),
        ((ROWS[0], ROWS[0] * 2, 2, "rrs"), "q has rows that do not sum"),
        ((ROWS[0], ROWS[0, 0], 2, "rrs"), "q must be"),
        (
            (torch.full((3000,), 1 / 3000),) * 2 + (3, "rrsw"),
            "k: draws without replacement are summed over",
        ),
    ],
)
def test_bad_acceptance_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        acceptance(*arguments)


def test_bad_linear_programs():
    wide = torch.full((13,), 1 / 13)
    with pytest.raises(ValueError, match=r"p must be .* at most 12"):
        otm(wide, wide, 2, "rrs")
    with pytest.raises(ValueError, match=r"k must be in 1\.\.3"):
        otm([0.5, 0.3, 0.2], [0.5, 0.3, 0.2], 4, "rrs")
