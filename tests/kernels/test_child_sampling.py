# SPDX-License-Identifier: Apache-2.0
"""Child sampling: three implementations that agree, and the distribution of what is drafted."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from helpers.drafting import huge_rows
from helpers.enumeration import DRAFTING, drafts, normalised
from helpers.written import first_arguments
from vllm_spechub.cpu.tree_kernels import sampling as numba_kernels
from vllm_spechub.measure.doctor.odd_rows import ODD_ROWS
from vllm_spechub.triton_kernels import lanes_device, rng
from vllm_spechub.triton_kernels.arguments import Children, KeptRows, Requests
from vllm_spechub.triton_kernels.child_sampling import kernel, sample_children
from vllm_spechub.triton_kernels.constants import CONFIDENT, FIRST_SAMPLE_LOSS, SAMPLE_SHARES
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES

SPLITS = lanes_device.SPLITS
RULES = tuple(BUILTIN_RULES)
BRANCHING = tuple(name for name, rule in BUILTIN_RULES.items() if rule.max_children > 1)
SPECHUB = tuple(name for name, rule in BUILTIN_RULES.items() if rule.sharpens)
HOST = {"reference": sample_children, "numba": numba_kernels.sample_children}

TEMPERATURES = [0.0, 0.5, 1.0, 0.02, 2.0]
SEEDS = [1, -7, 2**40 + 5, 12345, -(2**50)]


def on(device: str, *arguments):
    return [
        value._make(on(device, *value)) if isinstance(value, tuple) else value.to(device)
        for value in arguments
    ]


def implementations(device: str):
    """The kernels, on tensors of the CPU."""

    def triton(*rows, keep: KeptRows | None = None, **options) -> Children:
        kept = None if keep is None else KeptRows(*on(device, *keep))
        found = kernel.sample_children(*on(device, *rows), keep=kept, **options)
        if keep is not None:
            keep.logits.copy_(kept.logits)
        return Children(*(value.cpu() for value in found))

    return {"triton": triton, "numba": numba_kernels.sample_children}


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
    req_idx = torch.arange(num_rows, dtype=torch.int32) % 5
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
    host: str = "reference",
) -> Children:
    """`count` independent drafts from one row of logits."""
    return HOST[host](
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


def assert_same(found: Children, expected: Children) -> None:
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == wanted.dtype
        assert torch.equal(value, wanted)


SIZES = [(4, 16, torch.float32), (63, 16, torch.float16), (500, 128, torch.bfloat16)]
KERNEL_CASES = [
    *((rule, 4, 1.0, *sizes) for rule in BRANCHING for sizes in SIZES),
    *((rule, k, 1.0, *SIZES[1]) for rule in ("mixed", "rrs") for k in (1, 2, 3)),
    *((rule, k, 2.5, *SIZES[2]) for rule in SPECHUB[:2] for k in (1, 3)),
    ("chain", 1, 1.0, *SIZES[1]),
]


@pytest.mark.parametrize(
    ("rule", "max_children", "sharpening", "vocab_size", "lanes", "dtype"), KERNEL_CASES
)
def test_lanes_of_any_number(
    monkeypatch, device, rule, max_children, sharpening, vocab_size, lanes, dtype
):
    """The Triton kernel equals the reference, whatever a row's tokens and lanes are."""
    monkeypatch.setattr(rng, "LANES", lanes)
    rows = make_rows(14, vocab_size, max_children, dtype)
    options = {"rule": rule, "max_children": max_children, "sharpening": sharpening}
    found = implementations(device)["triton"](*rows, **options)
    assert_same(found, sample_children(*rows, **options))
    assert found.tokens.dtype == torch.int64
    assert found.sampled.dtype == torch.int32


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [
        (5, torch.float32),
        (500, torch.bfloat16),
        (rng.LANES, torch.float16),
        (2 * rng.LANES + 905, torch.float32),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_numba_equals_the_reference(rule, vocab_size, dtype):
    k = BUILTIN_RULES[rule].max_children
    rows = make_rows(40, vocab_size, k, dtype)
    for sharpening in (1.0, 2.0) if rule in SPECHUB else (1.0,):
        options = {"rule": rule, "max_children": k, "sharpening": sharpening}
        expected = sample_children(*rows, **options)
        assert_same(numba_kernels.sample_children(*rows, **options), expected)


@pytest.mark.parametrize(
    ("rule", "vocab_size", "splits"),
    [("mixed", rng.LANES, 1), ("mixed", 2 * rng.LANES + 905, SPLITS), ("rrs", 40_000, 2)],
)
def test_whole_lanes(monkeypatch, device, rule, vocab_size, splits):
    """The Triton kernels with the product's lanes, and several steps of a pass."""
    monkeypatch.setattr(lanes_device, "SPLITS", splits)
    rows = make_rows(12, vocab_size, 4, torch.float32)
    options = {"rule": rule, "max_children": 4}
    found = implementations(device)["triton"](*rows, **options)
    assert_same(found, sample_children(*rows, **options))


@pytest.mark.parametrize("rule", ["traversal", "rrsw"])
def test_alone_as_in_a_batch(monkeypatch, device, rule):
    """A row's children do not depend on other rows, nor do its lanes' sums, to the last bit."""
    monkeypatch.setattr(rng, "LANES", 128)
    monkeypatch.setattr(torch, "empty", torch.zeros)  # what is not written can be compared
    logits, nodes, counts, requests = make_rows(10, 500, 3, torch.bfloat16)
    sums = first_arguments(monkeypatch, kernel, "lane_sums_kernel")

    def drafted(implementation, own: slice) -> list[torch.Tensor]:
        sums.clear()
        of_rows = requests.rows(torch.arange(10)[own])
        options = {"rule": rule, "max_children": 3}
        return [*implementation(logits[own], nodes[own], counts[own], of_rows, **options), *sums]

    for implementation in implementations(device).values():
        together = drafted(implementation, slice(10))
        for row in range(10):
            own = slice(row, row + 1)
            for alone, value in zip(drafted(implementation, own), together, strict=True):
                assert torch.equal(alone, value[own])


@pytest.mark.parametrize("max_children", [1, 2, 3])
def test_smallest_vocabulary(device, max_children):
    rows = make_rows(12, 3, max_children, torch.float32)
    for rule in ("traversal", "rrs", "rrsw", "match"):
        options = {"rule": rule, "max_children": max_children}
        expected = sample_children(*rows, **options)
        for sample in implementations(device).values():
            assert_same(sample(*rows, **options), expected)


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [
        *((rule, torch.float32) for rule in BRANCHING),
        ("mixed", torch.float16),
        ("mixed", torch.bfloat16),
    ],
)
def test_odd_rows(device, rule, dtype):
    """Tokens of the vocabulary, the same from all; other rows are drafted as without odd ones."""
    vocab_size, num_rows = 70, 2 * len(ODD_ROWS)
    rows = make_rows(num_rows, vocab_size, 4, dtype)
    rows[2].fill_(4)
    rows[3].req_idx[:] = torch.arange(num_rows, dtype=torch.int32) % 4 + 1
    options = {"rule": rule, "max_children": 4}
    sound = sample_children(*rows, **options)
    rows[0] = rows[0].clone()
    for row, change in enumerate(ODD_ROWS.values()):
        change(rows[0][2 * row])
    expected = sample_children(*rows, **options)
    assert ((expected.tokens >= 0) & (expected.tokens < vocab_size)).all()
    assert torch.equal(expected.tokens[1::2], sound.tokens[1::2])
    assert torch.equal(expected.sampled[1::2], sound.sampled[1::2])
    by_name = dict(zip(ODD_ROWS, expected.tokens[::2].tolist(), strict=True))
    assert 1 not in by_name["one NaN"]
    assert 2 in by_name["one +inf"]
    assert set(by_name["two +inf"]) & {1, 2}
    assert by_name["all NaN"] == by_name["all -inf"] == [0, 1, 2, 3]
    if not BUILTIN_RULES[rule].replaces:
        assert all(len(set(tokens)) == 4 for tokens in by_name.values())
    for sample in implementations(device).values():
        assert_same(sample(*rows, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_kept(device, dtype):
    """As they are, in their request's and node's place, unless they are greedy or undrafted."""
    rows = make_rows(14, 63, 2, dtype)
    rows[0][3, 5] = float("nan")
    node_ids, requests = torch.arange(14, dtype=torch.int32) // 5, rows[3]
    internal_index = torch.tensor([1, -1, 0], dtype=torch.int32)
    node_ids[node_ids == 1] = 2
    req_idx = torch.tensor([0, 1, 2, 3, -1, 4, 3, 2, 1, 0, 0, 0, 0, 0], dtype=torch.int32)
    rows[1], rows[3] = node_ids, requests._replace(req_idx=req_idx)
    wanted = torch.full((6, 3, 80), 7.0, dtype=dtype)[:, :, :63]
    for row, (req, node) in enumerate(zip(req_idx.tolist(), node_ids.tolist(), strict=True)):
        if req >= 0 and TEMPERATURES[req] > 0:
            wanted[req, internal_index[node]] = rows[0][row]
    for sample in (sample_children, *implementations(device).values()):
        kept = torch.full((6, 3, 80), 7.0, dtype=dtype)
        keep = KeptRows(kept[:, :, :63], internal_index[node_ids])
        sample(*rows, rule="mixed", max_children=2, keep=keep)
        torch.testing.assert_close(keep.logits, wanted, rtol=0, atol=0, equal_nan=True)
        assert (kept[:, :, 63:] == 7.0).all()


def test_row_stride(device):
    rows = make_rows(12, 63, 3, torch.float32)
    options = {"rule": "ordered", "max_children": 3}
    expected = sample_children(*rows, **options)
    wide = torch.full((12, 100), float("nan"))
    wide[:, :63] = rows[0]
    rows[0] = wide[:, :63]
    assert_same(sample_children(*rows, **options), expected)
    assert_same(numba_kernels.sample_children(*rows, **options), expected)
    found = kernel.sample_children(wide.to(device)[:, :63], *on(device, *rows[1:]), **options)
    assert_same(Children(*(value.cpu() for value in found)), expected)


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


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("vocab_size", [4, 63])
def test_slots(vocab_size, rule):
    """Hubs by rank, ties to the lowest id, samples off them; in slots as the rule has it."""
    row = BUILTIN_RULES[rule]
    max_children = row.max_children
    never, always, confident = row.hubs.value
    rows = make_rows(40, vocab_size, max_children, torch.bfloat16)
    tokens, sampled = sample_children(*rows, rule=rule, max_children=max_children)
    for at in range(40):
        k = int(rows[2][at])
        drafted, bits = tokens[at].tolist(), int(sampled[at])
        if rows[3].req_idx[at] < 0:
            assert drafted == [-1] * max_children
            assert bits == -1
            continue
        logits = rows[0][at].double()
        temperature = TEMPERATURES[int(rows[3].req_idx[at])]
        ranked = logits.argsort(descending=True, stable=True).tolist()
        assert drafted[k:] == [-1] * (max_children - k)
        assert bits >> k == 0
        if temperature == 0 or logits.max() == -torch.inf:
            assert drafted[:k] == ranked[:k]
            assert bits == 0
            continue
        q = torch.softmax(logits / temperature, 0)
        num_hubs = min(k - never, always)
        while num_hubs < min(k - never, confident) and q[ranked[num_hubs]] > CONFIDENT:
            num_hubs += 1
        hubs = [token for slot, token in enumerate(drafted[:k]) if not bits >> slot & 1]
        drawn = [token for slot, token in enumerate(drafted[:k]) if bits >> slot & 1]
        assert set(ranked[:num_hubs]) <= set(hubs)
        assert set(hubs) - set(ranked[:num_hubs]) == set(hubs[num_hubs:])
        for token in hubs[num_hubs:]:  # nothing was left to draw from
            assert not row.replaces
            assert logits[token] == -torch.inf
        assert all(logits[token] > -torch.inf for token in drawn)
        assert not set(drawn) & set(hubs)
        if not row.replaces:
            assert len(set(drafted[:k])) == k
        if not row.ranks_subtrees:
            assert drafted[:k] == [*hubs[:num_hubs], *drawn, *hubs[num_hubs:]]
            continue
        z = 1.0 - float(q[ranked[:num_hubs]].sum())
        expected = {token: float(q[token]) for token in hubs}
        for number, token in enumerate(drawn):
            expected[token] = SAMPLE_SHARES[number] * z
        if drawn:
            expected[drawn[0]] *= 1.0 - FIRST_SAMPLE_LOSS * z
        values = [expected[token] for token in drafted[:k]]
        assert all(a >= b - 1e-6 for a, b in itertools.pairwise(values))


WEIGHTS = [
    [30, 70, 0, 60, 69, 8, 21],
    [9, 0, 0, 21, 0],  # fewer than three tokens
    [0, 5, 0],
    [0, 0, 0, 0],
    [50, 24, 16, 10],  # more than one token above the threshold
]


JOINT_CASES = [
    (rule, power, k, weights)
    for rule, row in BUILTIN_RULES.items()
    for power in ((1, 2) if rule in SPECHUB else (1,))
    for weights in WEIGHTS
    for k in range(1, min(len(weights), row.max_children) + 1)
]


@pytest.mark.parametrize("host", HOST)
@pytest.mark.parametrize(("rule", "power", "k", "weights"), JOINT_CASES)
def test_joint_distribution(host, rule, power, k, weights):
    """All slots together, as each rule defines them."""
    count = 10_000
    q = normalised(weights) if any(weights) else (0,) * len(weights)
    logits = torch.tensor(weights).float().log()
    tokens, sampled = many(logits, count, k, rule, sharpening=float(power), host=host)
    observed = Counter(zip(map(tuple, tokens.tolist()), sampled.tolist(), strict=True))
    expected: Counter = Counter()
    for prob, children in drafts(q, k, DRAFTING[rule], power):
        bits = sum(child.sampled << slot for slot, child in enumerate(children))
        expected[tuple(child.token for child in children), bits] += float(prob) * count
    assert observed.keys() <= expected.keys()
    rare = [key for key, value in expected.items() if value < 5]
    table = [(observed[key], value) for key, value in expected.items() if value >= 5]
    if rare:
        table.append((sum(observed[key] for key in rare), sum(expected[key] for key in rare)))
    if len(table) > 1:
        assert stats.chisquare(*zip(*table, strict=True)).pvalue > 1e-5


@pytest.mark.parametrize("lanes", [3, rng.LANES])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("rule", ["unordered", "traversal"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_distribution(monkeypatch, k, rule, temperature, lanes):
    """The sample is distributed as q off the hubs, whatever the lanes are."""
    monkeypatch.setattr(rng, "LANES", lanes)
    logits = torch.tensor([0.3, 1.1, -torch.inf, 0.9, 1.1, -1.0, 0.0])
    q = torch.softmax(logits.double() / temperature, dim=0).numpy()
    tokens, sampled = many(logits, 40_000, k, rule, temperature)
    # of tokens 1 and 4, which are as probable, the first lane's ranks first
    off_hubs = q.copy()
    off_hubs[[1, 4, 3][: k - 1]] = 0.0
    slot = sampled.log2().long()
    drawn = tokens.gather(1, slot.unsqueeze(1)).squeeze(1)
    assert_distributed(drawn, off_hubs / off_hubs.sum())


@pytest.mark.parametrize("lanes", [2, rng.LANES])
def test_improbable_tokens_are_drawn(monkeypatch, lanes):
    monkeypatch.setattr(rng, "LANES", lanes)
    logits = torch.tensor([0.0, 0.0, -11.0])
    count = 1_000_000
    tokens, _ = many(logits, count, 1, rule="unordered")
    expected = count * torch.softmax(logits.double(), dim=0)[2].item()
    assert stats.poisson.cdf((tokens == 2).sum().item(), expected) > 1e-4
    assert stats.poisson.sf((tokens == 2).sum().item() - 1, expected) > 1e-4


@pytest.mark.parametrize("host", HOST)
def test_confident_draft_still_samples_off_the_hubs(host):
    """A draft whose mass off the hubs vanishes in float32 still samples by relative weight."""
    logits = torch.tensor([300.0, 299.0, 0.0, np.log(3.0), -torch.inf])
    tokens, sampled = many(logits, 20_000, 3, rule="ordered", host=host)
    assert (sampled == 4).all()
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
        ({"keep": KeptRows(torch.zeros(2, 1, 8), torch.zeros(1))}, "keep.logits must be"),
        ({"keep": KeptRows(torch.zeros(2, 1, 9).half(), torch.zeros(1))}, "float16"),
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
        "keep": None,
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
    for sample in (sample_children, *implementations(device).values()):
        tokens, sampled = sample(*rows, rule="ordered", max_children=2)
        assert tokens.shape == (0, 2)
        assert sampled.shape == (0,)
