# SPDX-License-Identifier: Apache-2.0
"""Rows, not texts: every tree node's logits, positions, masks and KV against a plain sequence.

Wrong rows often leave greedy text unchanged, so these look at what the engine computed itself.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from helpers.engines import engine
from helpers.oracle import reference_model
from helpers.pair import PROMPTS
from helpers.recording import recorded_nodes, request_of
from vllm_spechub.engine.model_state import TreeModelState
from vllm_spechub.engine.sampler import TreeRejectionSampler


@dataclass
class CacheView:
    """A request's committed KV before one step: every layer's keys and values."""

    req_id: str
    length: int
    layers: list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture
def recorded(monkeypatch):
    """Every verified row, its rotary position, and the cache before every verification."""
    positions: list[int] = []
    caches: list[CacheView] = []
    layouts = []
    custom_sampler = TreeModelState.custom_sampler

    def keep_layout(self, sampler):
        layouts.append(self.layout)
        return custom_sampler(self, sampler)

    monkeypatch.setattr(TreeModelState, "custom_sampler", keep_layout)
    with recorded_nodes() as nodes:
        process = TreeRejectionSampler.process

        def spy(self, logits, batch):
            tables = self.compactor.block_tables.input_block_tables[0]
            views = self.compactor.compactors[0][1].kv_views
            block_size = views[0].shape[1]
            for r, req_id in enumerate(batch.req_ids):
                start, end = batch.cu_num_logits_np[r : r + 2]
                if end - start == 1:
                    continue
                rows = batch.logits_indices[start:end]
                positions.extend(layouts[-1].positions[rows].tolist())
                root = int(batch.positions[rows[0]])
                slots = np.arange(root)
                blocks = tables[r][slots // block_size].long()
                held = [view[blocks, slots % block_size].view(torch.float32) for view in views]
                caches.append(
                    CacheView(req_id, root, list(zip(held[::2], held[1::2], strict=True)))
                )
            return process(self, logits, batch)

        monkeypatch.setattr(TreeRejectionSampler, "process", spy)
        yield nodes, positions, caches


def run(params, **options):
    with engine("binary:3", **options) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return {
        output.request_id: list(output.prompt_token_ids) + list(output.outputs[0].token_ids)
        for output in outputs
    }


def plain_row(tokens: list[int]) -> torch.Tensor:
    return reference_model()(input_ids=torch.tensor([tokens])).logits[0, -1]


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 41, "block_size": 32}])
def test_every_node_equals_its_path_decoded_plainly(recorded, options):
    from vllm import SamplingParams

    nodes, positions, caches = recorded
    texts = run(SamplingParams(temperature=1.0, seed=3, max_tokens=24, ignore_eos=True), **options)
    assert len(nodes) > 400
    depths = {len(node.path_tokens) for node in nodes}
    assert depths == {0, 1, 2, 3}
    recorded_rows = list(zip(nodes, positions, strict=True))
    for node, position in recorded_rows[::17]:
        text = texts[request_of(node.req_id)][: node.root_position + 1]
        expected = plain_row([*text, *node.path_tokens])
        torch.testing.assert_close(node.logits, expected, atol=2e-4, rtol=1e-4)
        assert position == node.root_position + len(node.path_tokens)
    for cache in caches[::13]:
        text = texts[request_of(cache.req_id)][: cache.length]
        if not text:
            continue
        plain = reference_model()(input_ids=torch.tensor([text]), use_cache=True).past_key_values
        for layer, (key, value) in enumerate(cache.layers):
            for held, wanted in (
                (key, plain.layers[layer].keys),
                (value, plain.layers[layer].values),
            ):
                torch.testing.assert_close(held, wanted[0].transpose(0, 1), atol=2e-4, rtol=1e-4)


def test_processors_see_each_nodes_own_history(recorded, monkeypatch):
    """Penalties, min_tokens and bad words on every node, next to plain requests, in chunks."""
    from vllm import SamplingParams

    from vllm_spechub.engine import sampler
    from vllm_spechub.engine.processors import HistoryProcessors

    nodes, _, _ = recorded
    resolved = []  # the engine's copies: they know the stop tokens and the bad words' tokens
    add_request = HistoryProcessors.add_request

    def spy(self, req_idx, sampling_params):
        resolved.append(sampling_params)
        return add_request(self, req_idx, sampling_params)

    monkeypatch.setattr(HistoryProcessors, "add_request", spy)
    monkeypatch.setattr(sampler, "get_max_chunk_logits", lambda vocab_size: 40)
    penalties = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3}
    params = [
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=20, min_tokens=9, **penalties),
        SamplingParams(temperature=0.8, seed=1, max_tokens=20, ignore_eos=True, **penalties),
        SamplingParams(temperature=0, max_tokens=20, bad_words=[" stream", "self"]),
        SamplingParams(temperature=0.5, seed=2, max_tokens=20, top_k=5, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=20, min_tokens=20, ignore_eos=True),
    ]
    texts = run(params)
    params = resolved
    prompt_lengths = [len(t) for t in map(tokenizer_ids, PROMPTS)]
    used = 0
    for node in nodes:
        i = int(request_of(node.req_id))
        text = texts[request_of(node.req_id)][: node.root_position + 1]
        history = [*text, *node.path_tokens]
        prompt, output = history[: prompt_lengths[i]], history[prompt_lengths[i] :]
        expected = reference_process(node.logits, prompt, output, params[i])
        if params[i].temperature and i in (2, 4):
            used += 1
            expected = expected / params[i].temperature
        if params[i].top_k > 0:
            floor = expected.topk(params[i].top_k).values[-1]
            expected = expected.masked_fill(expected < floor, float("-inf"))
        torch.testing.assert_close(node.processed, expected, atol=1e-4, rtol=1e-4)
    assert used > 50


def tokenizer_ids(text: str) -> list[int]:
    from transformers import AutoTokenizer

    from helpers.pair import TARGET

    return AutoTokenizer.from_pretrained(TARGET)(text)["input_ids"]


def reference_process(logits, prompt, output, params) -> torch.Tensor:
    """OpenAI's penalties, vLLM's repetition penalty, min_tokens and bad words, one row."""
    row = logits.clone().float()
    if len(output) < params.min_tokens:
        row[list(params.all_stop_token_ids)] = float("-inf")
    seen = list({*prompt, *output})
    if params.repetition_penalty != 1.0:
        values = row[seen]
        scaled = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
        row[seen] = scaled
    counts = torch.bincount(torch.tensor(output, dtype=torch.long), minlength=len(row))
    row -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    for word in params.bad_words_token_ids or []:
        *start, last = word
        if not start or output[-len(start) :] == start:
            row[last] = float("-inf")
    return row


def test_logprobs_equal_plain_vllm():
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=24, logprobs=4, prompt_logprobs=2)

    def logprobs(outputs):
        rows = []
        for output in outputs:
            for entries in output.outputs[0].logprobs + (output.prompt_logprobs or []):
                rows.append({} if entries is None else {t: e.logprob for t, e in entries.items()})
        return rows

    with engine() as llm:
        expected = logprobs(llm.generate(PROMPTS, params, use_tqdm=False))
    with engine("binary:3") as llm:
        found = logprobs(llm.generate(PROMPTS, params, use_tqdm=False))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), [b[t] for t in a], atol=1e-4)
