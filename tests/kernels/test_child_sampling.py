# SPDX-License-Identifier: Apache-2.0
"""Child sampling: kernel against reference, the slots, and the distribution of what is drafted."""

import numpy as np
import pytest
import torch
from scipy import stats

from helpers.drafting import huge_rows
from helpers.enumeration import enumerate_drafts
from vllm_spechub.triton_kernels import rng
from vllm_spechub.triton_kernels.arguments import Requests
from vllm_spechub.triton_kernels.child_sampling import kernel, sample_children
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES

RULES = tuple(BUILTIN_RULES)
SPECHUB = tuple(name for name, rule in BUILTIN_RULES.items() if rule.sharpens)

TEMPERATURES = [0.0, 0.5, 1.0, 0.02]
SEEDS = [1, -7, 2**40 + 5, 12345]


def on(device: str, *arguments):
    return [
        Requests(*on(device, *value)) if isinstance(value, Requests) else value.to(device)
        for value in arguments
    ]


def make_rows(num_rows: int, vocab_size: int, max_children: int, dtype: torch.dtype) -> list:
    """Arguments with ties, masked tokens, skipped rows and every number of children."""
    generator = torch.Generator().manual_seed(vocab_size * 10 + max_children)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * 3
    logits[1] = logits[1].round()  # ties
    logits[2, 2:] = -torch.inf  # fewer tokens than children
    logits[3, : vocab_size // 2] = -torch.inf
    logits[4] = 0.0
    logits[5, 1] += 200.0  # nothing left off the hubs in float32
    logits[7] = -torch.inf  # nothing at all
    logits[8, 1:] = -torch.inf  # one token
    req_idx = torch.arange(num_rows, dtype=torch.int32) % 4
    req_idx[2:9] = 2  # the special rows at temperature 1
    req_idx[6] = -1
    return [
        logits.to(dtype),
        torch.arange(num_rows, dtype=torch.int32) % 64,
        torch.arange(num_rows, dtype=torch.int32) % max_children + 1,
        Requests(
            req_idx,
            torch.arange(num_rows) * 100,
            torch.tensor(TEMPERATURES),
            torch.tensor(SEEDS),
        ),
    ]


def many(
    logits: torch.Tensor,
    count: int,
    k: int,
    rule: str,
    temperature: float = 1.0,
    sharpening: float = 1.0,
):
    """`count` independent drafts from one row of logits."""
    return sample_children(
        logits.expand(count, -1),
        torch.full((count,), 3, dtype=torch.int32),
        torch.full((count,), k, dtype=torch.int32),
        Requests(
            torch.arange(count),
            torch.full((count,), 17),
            torch.full((count,), temperature),
            torch.arange(count),
        ),
        rule=rule,
        max_children=k,
        sharpening=sharpening,
    )


def assert_distributed(samples: torch.Tensor, probs: np.ndarray) -> None:
    observed = np.bincount(samples.numpy(), minlength=len(probs))
    assert (observed[probs == 0] == 0).all()
    support = probs > 0
    if support.sum() > 1:
        expected = probs[support] * len(samples)
        assert stats.chisquare(observed[support], expected).pvalue > 1e-4


SIZES = [
    (4, 16, torch.float32),
    (63, 16, torch.float16),
    (500, 128, torch.bfloat16),
    (1030, 2048, torch.float32),
]
KERNEL_CASES = [
    *((rule, k, 1.0, *sizes) for rule in RULES[:-1] for k in (2, 4) for sizes in SIZES),
    *((rule, k, 1.0, *SIZES[1]) for rule in RULES[:-1] for k in (1, 3)),
    *((rule, k, 2.5, *SIZES[2]) for rule in SPECHUB for k in (1, 3)),
    ("chain", 1, 1.0, *SIZES[1]),
]


@pytest.mark.parametrize(
    ("rule", "max_children", "sharpening", "vocab_size", "lanes", "dtype"), KERNEL_CASES
)
def test_kernel_equals_reference(
    monkeypatch, device, rule, max_children, sharpening, vocab_size, lanes, dtype
):
    monkeypatch.setattr(rng, "LANES", lanes)
    rows = make_rows(14, vocab_size, max_children, dtype)
    options = {"rule": rule, "max_children": max_children, "sharpening": sharpening}
    tokens, sample_slot = sample_children(*rows, **options)
    actual, actual_slot = kernel.sample_children(*on(device, *rows), **options)
    assert torch.equal(actual.cpu(), tokens)
    assert torch.equal(actual_slot.cpu(), sample_slot)
    assert actual.dtype == torch.int64
    assert actual_slot.dtype == torch.int32


@pytest.mark.parametrize("max_children", [1, 2, 3])
def test_smallest_vocabulary(device, max_children):
    rows = make_rows(12, 3, max_children, torch.float32)
    for rule in RULES[:-1]:
        options = {"rule": rule, "max_children": max_children}
        tokens, _ = sample_children(*rows, **options)
        assert torch.equal(kernel.sample_children(*on(device, *rows), **options)[0].cpu(), tokens)


def test_row_stride(device):
    rows = make_rows(12, 63, 3, torch.float32)
    options = {"rule": "ordered", "max_children": 3}
    expected = sample_children(*rows, **options)
    wide = torch.full((12, 100), float("nan"))
    wide[:, :63] = rows[0]
    rows[0] = wide[:, :63]
    for implementation in (sample_children, kernel.sample_children):
        where = "cpu" if implementation is sample_children else device
        arguments = [wide.to(where)[:, :63], *on(where, *rows[1:])]
        for value, reference in zip(implementation(*arguments, **options), expected, strict=True):
            assert torch.equal(value.cpu(), reference)


def test_offsets_beyond_32_bits(device):
    if device != "cpu":
        pytest.skip("needs memory that is reserved but not used")
    logits = huge_rows(4, 2**30 + 16, 8)
    rows = make_rows(12, 8, 2, torch.bfloat16)
    rows = [*(value[:4] for value in rows[:3]), rows[3].rows(torch.arange(4))]
    logits.copy_(rows[0])
    options = {"rule": "ordered", "max_children": 2}
    expected = sample_children(logits.contiguous(), *rows[1:], **options)
    actual = kernel.sample_children(logits, *rows[1:], **options)
    assert torch.equal(actual[0], expected[0])


@pytest.mark.parametrize("rule", ["unordered", "ordered"])
@pytest.mark.parametrize("max_children", [1, 2, 3, 4])
@pytest.mark.parametrize("vocab_size", [4, 63])
def test_slots(vocab_size, max_children, rule):
    """Hubs by rank, ties to the lowest id; the sampled child off the hubs, in its slot."""
    rows = make_rows(40, vocab_size, max_children, torch.bfloat16)
    tokens, sample_slot = sample_children(*rows, rule=rule, max_children=max_children)
    for row in range(40):
        k = int(rows[2][row])
        drafted = tokens[row].tolist()
        if rows[3].req_idx[row] < 0:
            assert drafted == [-1] * max_children
            assert sample_slot[row] == -1
            continue
        logits = rows[0][row].tolist()
        ranked = sorted(range(vocab_size), key=lambda token: (-logits[token], token))
        hubs, slot = ranked[: k - 1], int(sample_slot[row])
        assert drafted[k:] == [-1] * (max_children - k)
        assert slot == k - 1 or (rule == "ordered" and slot == 0)
        sampled = drafted[slot]
        others = drafted[:slot] + drafted[slot + 1 : k]
        assert sampled not in hubs
        assert sorted(others) == sorted(hubs)
        if rule == "ordered" and k > 1 and slot > 0:
            # The main hub comes first, the rest by rank.
            others = others[1:]
        assert others == [hub for hub in hubs if hub in others]
        if logits[sampled] == -np.inf:
            # Only where no other token is left, and then the lowest id.
            assert all(logits[token] == -np.inf for token in ranked[k - 1 :])
            assert sampled == ranked[k - 1]
        if TEMPERATURES[int(rows[3].req_idx[row])] == 0:
            assert drafted[:k] == ranked[:k]
            assert slot == k - 1


@pytest.mark.parametrize(
    ("rule", "sharpening"), [*((r, 1.0) for r in RULES[:-1]), *((r, 2.0) for r in SPECHUB)]
)
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(
    "logits",
    [
        [0.3, 1.1, -torch.inf, 0.9, 1.1, -1.0, 0.0],
        [0.3, -torch.inf, -torch.inf, 1.1, -torch.inf],  # fewer than three tokens
        [-torch.inf, 0.3, -torch.inf],
        [-torch.inf] * 4,
    ],
)
def test_joint_distribution(rule, k, logits, sharpening):
    """All slots together, as each rule defines them."""
    count, logits = 20_000, torch.tensor(logits)
    vocab_size = len(logits)
    q = torch.softmax(logits.double(), dim=0).nan_to_num().numpy()
    drafts = enumerate_drafts(q, k, rule, sharpening=sharpening)
    tokens, sample_slot = many(logits, count, k, rule, sharpening=sharpening)
    powers = vocab_size ** torch.arange(k)
    probs = np.zeros(vocab_size**k * k)
    cells = (drafts.children * powers).sum(dim=1) * k + drafts.sample_slot
    np.add.at(probs, cells.numpy(), drafts.prob.numpy())
    assert_distributed((tokens * powers).sum(dim=1) * k + sample_slot, probs)


@pytest.mark.parametrize("lanes", [3, rng.LANES])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("rule", ["unordered", "ordered"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_distribution(monkeypatch, k, rule, temperature, lanes):
    """x ~ q off the hubs; the label is independent of x; slot 0 ~ q when ordered."""
    monkeypatch.setattr(rng, "LANES", lanes)
    vocab_size, count = 7, 40_000
    logits = torch.tensor([0.3, 1.1, -torch.inf, 0.9, 1.1, -1.0, 0.0])
    q = torch.softmax(logits.double() / temperature, dim=0).numpy()
    tokens, sample_slot = many(logits, count, k, rule, temperature)
    hubs = [1, 4, 3][: k - 1]
    w = q.copy()
    w[hubs] = 0.0
    off_hub_mass = w.sum()
    sampled = tokens.gather(1, sample_slot.long().unsqueeze(1)).squeeze(1)
    assert_distributed(sampled, w / off_hub_mass)
    if rule == "unordered" or k == 1:
        return
    assert_distributed(tokens[:, 0], q)
    is_main = (sample_slot == 0).numpy()
    assert stats.binomtest(int(is_main.sum()), count, off_hub_mass).pvalue > 1e-4
    support = np.flatnonzero(w)
    table = [
        np.bincount(sampled.numpy()[choice], minlength=vocab_size)[support]
        for choice in (is_main, ~is_main)
    ]
    assert stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.parametrize("lanes", [2, rng.LANES])
def test_improbable_tokens_are_drawn(monkeypatch, lanes):
    monkeypatch.setattr(rng, "LANES", lanes)
    logits = torch.tensor([0.0, 0.0, -11.0])
    count = 1_000_000
    tokens, _ = many(logits, count, 1, rule="unordered")
    expected = count * torch.softmax(logits.double(), dim=0)[2].item()
    assert stats.poisson.cdf((tokens == 2).sum().item(), expected) > 1e-4
    assert stats.poisson.sf((tokens == 2).sum().item() - 1, expected) > 1e-4


def test_confident_draft_still_samples_off_the_hubs():
    """A law whose off-hub mass vanishes in float32 still samples by relative weight."""
    logits = torch.tensor([300.0, 299.0, 0.0, np.log(3.0), -torch.inf])
    tokens, sample_slot = many(logits, 20_000, 3, rule="ordered")
    assert (sample_slot == 2).all()
    assert_distributed(tokens[:, 2], np.array([0, 0, 0.25, 0.75, 0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(5)}, "logits"),
        ({"logits": torch.zeros(9, 5).t()}, "logits"),
        ({"max_children": 5}, "max_children"),
        ({"max_children": 0}, "max_children"),
        ({"rule": "maybe"}, "rule"),
        ({"rule": "chain"}, "chain"),
        ({"sharpening": float("inf")}, "sharpening"),
        ({"req_idx": torch.zeros(4, dtype=torch.int32)}, "req_idx"),
        ({"num_children": torch.ones(5, 1, dtype=torch.int32)}, "num_children"),
        ({"seeds": torch.zeros(1, dtype=torch.int64)}, "seeds"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "logits": torch.zeros(5, 9),
        "node_ids": torch.zeros(5, dtype=torch.int32),
        "num_children": torch.ones(5, dtype=torch.int32),
        "max_children": 2,
        "rule": "ordered",
        "sharpening": 1.0,
    }
    requests = {
        "req_idx": torch.zeros(5, dtype=torch.int32),
        "root_positions": torch.zeros(5, dtype=torch.int64),
        "temperature": torch.ones(2),
        "seeds": torch.zeros(2, dtype=torch.int64),
    }

    def sample(**change):
        for given in (arguments, requests):
            given |= {name: value for name, value in change.items() if name in given}
        sample_children(**arguments, requests=Requests(**requests))

    sample()
    with pytest.raises(ValueError, match=message):
        sample(**change)


def test_no_rows(device):
    *rows, requests = make_rows(9, 9, 2, torch.float32)
    rows = [*(value[:0] for value in rows), requests.rows(torch.arange(0))]
    for implementation, where in ((sample_children, "cpu"), (kernel.sample_children, device)):
        tokens, sample_slot = implementation(*on(where, *rows), rule="ordered", max_children=2)
        assert tokens.shape == (0, 2)
        assert sample_slot.shape == (0,)
