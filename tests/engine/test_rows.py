# SPDX-License-Identifier: Apache-2.0
"""Rows, not texts: every tree node's logits, positions, masks and KV against a plain sequence.

Wrong rows often leave greedy text unchanged, so these look at what the engine computed itself.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from helpers.engines import engine
from helpers.oracle import processed_row, reference_model, resolved, tokens_of
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
    # what is replaced last is put back first
    with recorded_nodes() as nodes, pytest.MonkeyPatch.context() as patch:
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

        patch.setattr(TreeRejectionSampler, "process", spy)
        yield nodes, positions, caches


def run(params, tree="binary:3", **options):
    with engine(tree, **options) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return {
        output.request_id: list(output.prompt_token_ids) + list(output.outputs[0].token_ids)
        for output in outputs
    }


def plain_row(tokens: list[int]) -> torch.Tensor:
    return reference_model()(input_ids=torch.tensor([tokens])).logits[0, -1]


LEVELS = {"tree": "levels:3,4,4", "verification": "mixed"}


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 41, "block_size": 32}, LEVELS])
def test_every_node_equals_its_path_decoded_plainly(recorded, options):
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


@pytest.mark.parametrize("options", [{}, LEVELS])
def test_processors_see_each_nodes_own_history(recorded, monkeypatch, options):
    """Penalties, min_tokens and bad words on every node, next to plain requests, in chunks."""
    from vllm_spechub.engine import sampler

    nodes, _, _ = recorded
    monkeypatch.setattr(sampler, "most_processed_rows", lambda vocab_size: 40)
    penalties = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3}
    params = [
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=20, min_tokens=9, **penalties),
        SamplingParams(temperature=0.8, seed=1, max_tokens=20, ignore_eos=True, **penalties),
        SamplingParams(temperature=0, max_tokens=20, bad_words=[" stream", "self"]),
        SamplingParams(temperature=0.5, seed=2, max_tokens=20, top_k=5, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=20, min_tokens=20, ignore_eos=True),
    ]
    texts = run(params, **options)
    params = [resolved(each) for each in params]
    prompt_lengths = [len(tokens_of(prompt)) for prompt in PROMPTS]
    sampled = 0
    for node in nodes:
        i = int(request_of(node.req_id))
        history = [*texts[str(i)][: node.root_position + 1], *node.path_tokens]
        prompt, output = history[: prompt_lengths[i]], history[prompt_lengths[i] :]
        expected = processed_row(node.logits, prompt, output, params[i])
        found = node.processed / (node.temperature or 1.0)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        sampled += params[i].temperature > 0
    assert sampled > 50
