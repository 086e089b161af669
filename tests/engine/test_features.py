# SPDX-License-Identifier: Apache-2.0
"""Models and engine features beside the demo pair's: rows against transformers, texts against
plain decoding."""

import random

import pytest
import torch
from vllm import SamplingParams

from helpers import models
from helpers.engines import engine, greedy_params, logprob_rows, model_runner, token_ids
from helpers.heads import recorded_rows
from helpers.metrics import spec_metrics
from helpers.oracle import reference_model
from helpers.pair import DRAFT, EAGLE3, PROMPTS, TARGET
from helpers.recording import recorded_nodes, request_of
from vllm_spechub.offline.simulation.rows import draft_logits
from vllm_spechub.offline.simulation.texts import ModelPair

SAMPLED = SamplingParams(temperature=1.0, seed=3, max_tokens=50, ignore_eos=True)
TO_THE_END = greedy_params(50, ignore_eos=True)


def plain_rows(model: str, texts: list[list[int]]) -> torch.Tensor:
    """What follows each token of each text, decoded plainly. [num_texts, longest, vocab_size]"""
    rows = [torch.tensor(text) for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # causal: no mask needed
    return reference_model(model)(input_ids=padded).logits


@pytest.fixture
def nodes():
    """The rows of every verification."""
    with recorded_nodes() as nodes:
        yield nodes


def assert_rows(nodes, outputs, model, count=60) -> None:
    """Recorded rows, chosen at random, equal the plain decoding of their paths."""
    texts = {o.request_id: [*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs}
    nodes = [node for node in nodes if request_of(node.req_id) in texts]
    chosen = random.Random(0).sample(nodes, count)
    assert {len(node.path_tokens) for node in chosen} == {0, 1, 2, 3}
    for start in range(0, len(chosen), 32):
        part = chosen[start : start + 32]
        tokens = [
            [*texts[request_of(n.req_id)][: n.root_position + 1], *n.path_tokens] for n in part
        ]
        rows = plain_rows(model, tokens)
        for node, text, row in zip(part, tokens, rows, strict=True):
            torch.testing.assert_close(node.logits, row[len(text) - 1], atol=5e-4, rtol=1e-4)


def assert_greedy(outputs, model) -> None:
    """Each token is the plain model's best, given all before it."""
    texts = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs]
    best = plain_rows(model, texts).argmax(-1).tolist()
    for output, text, row in zip(outputs, texts, best, strict=True):
        start = len(output.prompt_token_ids)
        assert text[start:] == row[start - 1 : len(text) - 1]


def free_blocks(llm) -> int:
    manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    return manager.block_pool.get_num_free_blocks()


def given_away(llm, monkeypatch) -> list[int]:
    """How many blocks of a live request vLLM takes back because no window reaches them."""
    from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager

    counts = []
    original = SlidingWindowManager._remove_blocks_in_range

    def spy(self, request_id, first, last):
        held = [b for b in self.req_to_blocks[request_id][first:last] if not b.is_null]
        counts.append(len(held))
        original(self, request_id, first, last)

    monkeypatch.setattr(SlidingWindowManager, "_remove_blocks_in_range", spy)
    return counts


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_sliding_windows(family, tmp_path, nodes, monkeypatch):
    """All layers or every other, windows smaller than a block; several groups of KV blocks."""
    if family == "mistral":
        target = models.mistral(tmp_path / "target", TARGET, window=24)
        draft = models.mistral(tmp_path / "draft", DRAFT, window=20)
    else:
        target, draft = models.gemma3_pair(tmp_path, window=21)
    with engine("binary:3", model=target, draft=draft, block_size=32) as llm:
        groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
        assert len(groups) > 1
        before, counts = free_blocks(llm), given_away(llm, monkeypatch)
        sampled = llm.generate(PROMPTS, SAMPLED, use_tqdm=False)
        greedy = llm.generate(PROMPTS, TO_THE_END, use_tqdm=False)
        # continue on what trees wrote: the prefix cache of every group
        longer = [
            {"prompt_token_ids": [*o.prompt_token_ids, *o.outputs[0].token_ids]} for o in greedy
        ]
        again = llm.generate(longer, greedy_params(20, ignore_eos=True), use_tqdm=False)
        metrics = spec_metrics(llm)
        assert free_blocks(llm) == before
    assert metrics["num_accepted_tokens"] > 0.5 * metrics["num_drafts"]
    assert sum(counts) > 20
    assert any(output.num_cached_tokens for output in again)
    assert_rows(nodes, sampled, target, count=150)
    assert_greedy([*greedy, *again], target)


def test_lora_adapters_on_the_target(tmp_path, nodes):
    """Two adapters and none in one batch, output matrices included: each row has its request's, and
    so have the hidden states that a head reads."""
    from vllm.lora.request import LoRARequest

    target = models.untied(tmp_path / "target", TARGET)
    adapters = [models.lora_adapter(tmp_path, target, seed) for seed in (1, 2)]
    loras = [
        None,
        *(LoRARequest(f"adapter{i}", i, path) for i, (path, _) in enumerate(adapters, 1)),
    ] * 2
    references = [target, *(merged for _, merged in adapters)] * 2
    # vLLM's CPU kernels take "no adapter" for the last slot: it must stay empty
    options = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}
    with (
        recorded_rows() as drafted,
        engine("binary:3", model=target, draft=EAGLE3, **options) as llm,
    ):
        sampled = llm.generate(PROMPTS, SAMPLED, use_tqdm=False, lora_request=loras)
        greedy = llm.generate(PROMPTS, TO_THE_END, use_tqdm=False, lora_request=loras)
        metrics = spec_metrics(llm)
    assert metrics["num_accepted_tokens"] > 0.3 * metrics["num_drafts"]
    assert len({tuple(output.outputs[0].token_ids) for output in greedy}) == len(PROMPTS)
    for i, reference in enumerate(references):
        assert_rows(nodes, [sampled[i]], reference, count=40)
        assert_greedy([greedy[i]], reference)
    for output, reference in zip(sampled[:3], references, strict=False):
        pair = ModelPair.load(reference, EAGLE3, "cpu", torch.float32)
        rows = [row for row in drafted if request_of(row.req_id) == output.request_id]
        for row in rows[:: len(rows) // 8]:
            found = draft_logits(pair, torch.tensor(row.text), torch.tensor(row.path).long())
            torch.testing.assert_close(found, row.logits, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("target", "draft"), [("fp8", None), ("auto", "fp8_e5m2")], ids=["both", "draft only"]
)
def test_fp8_cache(target, draft):
    """Trees read the quantised keys and values that a plain decode would have written."""
    params = greedy_params(40, ignore_eos=True, logprobs=3)
    with engine(kv_cache_dtype=target) as llm:
        expected = llm.generate(PROMPTS, params, use_tqdm=False)
    extra = {} if draft is None else {"kv_cache_dtype": draft}
    with engine("binary:3", kv_cache_dtype=target, spec=extra) as llm:
        found = llm.generate(PROMPTS, params, use_tqdm=False)
        metrics = spec_metrics(llm)
        caches = {
            getattr(layer, "is_draft_layer", False): layer.kv_cache.dtype
            for layer in model_runner(llm).compilation_config.static_forward_context.values()
        }
    assert caches == {False: torch.float32 if target == "auto" else torch.uint8, True: torch.uint8}
    assert metrics["num_accepted_tokens"] > 0.5 * metrics["num_drafts"]
    assert token_ids(found) == token_ids(expected)
    for output, wanted in zip(found, expected, strict=True):
        rows = zip(logprob_rows(output), logprob_rows(wanted), strict=True)
        assert all(row == pytest.approx(plain, abs=1e-3) for row, plain in rows)


def test_a_draft_whose_path_names_a_head(tmp_path):
    """vLLM would load it as EAGLE's, for a word in its path."""
    draft = models.edited(tmp_path / "eagle3-and-dspark", DRAFT)
    params = [TO_THE_END] * len(PROMPTS)
    with engine("binary:3", draft=draft) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        metrics = spec_metrics(llm)
    assert metrics["num_accepted_tokens"] > 0.3 * metrics["num_drafts"]
    assert_greedy(outputs, TARGET)


def test_a_draft_of_another_family_and_padding(tmp_path, nodes):
    """Padding that the target emits and the draft has no row for; then the other way round."""
    long, short = (
        models.padded(tmp_path / "target", TARGET, 2112),
        models.qwen2(tmp_path / "q", TARGET),
    )
    params = [greedy_params(50, ignore_eos=True, detokenize=False)] * len(PROMPTS)
    with engine("binary:3", model=long, draft=short) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        metrics = spec_metrics(llm)
    assert metrics["num_accepted_tokens"] > 0.3 * metrics["num_drafts"]
    assert sum(token >= 2048 for ids in token_ids(outputs) for token in ids) > 10
    assert_greedy(outputs, long)
    assert_rows(nodes, outputs, long)

    short, long = TARGET, models.padded(tmp_path / "draft", DRAFT, 2176)
    with engine("binary:3", model=short, draft=long) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        metrics = spec_metrics(llm)
    assert metrics["num_accepted_tokens"] > 0.3 * metrics["num_drafts"]
    assert_greedy(outputs, short)
