# SPDX-License-Identifier: Apache-2.0
"""Targets whose prompts have images, with a draft that reads text only.

The requests of a batch are with one image, with two, and without.
"""

import pytest
import torch
from vllm import SamplingParams

from helpers import multimodal
from helpers.engines import engine, greedy_params, model_runner, plain_engine, token_ids
from helpers.ensembles import combined_row, member_rows
from helpers.metrics import spec_metrics
from helpers.multimodal import SIZES
from helpers.oracle import reference_model
from helpers.pair import DRAFT, PROMPTS
from helpers.recording import Node, recorded_nodes, request_of
from vllm_spechub.engine.model_state import TreeModelState

GREEDY = greedy_params(24, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=5, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def importable():
    with multimodal.importable():
        yield


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def target(request, tmp_path_factory) -> multimodal.Target:
    return multimodal.target(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def plain(target) -> list[list[int]]:
    """What vLLM's default runner answers."""
    with engine(**target.options) as llm:
        answers = token_ids(llm.generate(target.prompts(), GREEDY, use_tqdm=False))
        blind = token_ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    assert [i for i in range(len(PROMPTS)) if answers[i] != blind[i]] == [*SIZES], (
        "images that change nothing show nothing"
    )
    return answers


@pytest.mark.parametrize("scheduling", [False, True])
def test_greedy(target, plain, scheduling):
    """In chunks of prompts and with little memory, then again from the prefix cache."""
    options = {"max_num_batched_tokens": 64, "block_size": 32, "num_gpu_blocks_override": 9}
    options |= target.options | {"async_scheduling": scheduling}
    with engine("binary:3", **options) as llm:
        first = token_ids(llm.generate(target.prompts(), GREEDY, use_tqdm=False))
        again = llm.generate(target.prompts()[4], GREEDY, use_tqdm=False)
        again += llm.generate(target.prompts()[4], GREEDY, use_tqdm=False)
        metrics = spec_metrics(llm)
        preemptions = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    assert first == plain
    assert token_ids(again) == [plain[4]] * 2
    assert again[1].num_cached_tokens >= 32
    assert preemptions[0] > 0
    assert metrics["num_accepted_tokens"] > 0.2 * metrics["num_drafts"]


def test_every_node_equals_its_path_decoded_plainly(target, monkeypatch):
    """Its logits and its position in every dimension; the draft read the text alone."""
    positions: list[torch.Tensor] = []
    prepare_inputs = TreeModelState.prepare_inputs

    def spy(self, batch, req_states):
        inputs = prepare_inputs(self, batch, req_states)
        for r in range(batch.num_reqs):
            rows = batch.logits_indices[slice(*batch.cu_num_logits_np[r : r + 2])]
            if len(rows) > 1:
                positions.extend(inputs["positions"][..., rows].movedim(-1, 0))
        return inputs

    monkeypatch.setattr(TreeModelState, "prepare_inputs", spy)
    # so that some trees are truncated
    options = target.options | {"max_num_batched_tokens": 60, "block_size": 32}
    with recorded_nodes() as nodes, engine("binary:3", **options) as llm:
        for _ in range(2):  # the second has only its last token to read, and placeholders below
            llm.generate({"prompt_token_ids": list(range(100, 133))}, SEEDED, use_tqdm=False)
        assert any(node.root_position < 33 for node in nodes)
        assert all(position.min() >= 0 for position in positions)
        nodes.clear()
        positions.clear()
        outputs = llm.generate(target.prompts(), SEEDED, use_tqdm=False)
    assert len(nodes) > 300
    by_request = {output.request_id: i for i, output in enumerate(outputs)}
    texts = [[*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs]
    real = []
    for node, position in zip(nodes, positions, strict=True):
        i = by_request[request_of(node.req_id)]
        if node.root_position < len(outputs[i].prompt_token_ids):
            continue  # a placeholder below a prompt's last token
        expected = node.root_position + len(node.path_tokens) + target.delta(i)
        assert position.unique().tolist() == [expected]
        assert position.numel() == (3 if target.has_mrope else 1)
        real.append((i, node))
    assert {len(node.path_tokens) for _, node in real} == {0, 1, 2, 3}
    some = [(i, node) for i, node in real[::11] if i in SIZES] + real[::61]

    def after(i: int, node: Node) -> list[int]:
        return [*texts[i][: node.root_position + 1], *node.path_tokens]

    drafted = [(i, node) for i, node in some if node.draft_logits is not None]
    for i, node in drafted:
        read = torch.tensor([after(i, node)]).clamp(max=2047)  # the draft has no other tokens
        expected = reference_model(DRAFT)(input_ids=read).logits[0, -1]
        found = node.draft_logits
        torch.testing.assert_close(found[:2048], expected, atol=2e-4, rtol=1e-4)
        assert (found[2048:] == -torch.inf).all()
    assert len(drafted) > 10

    prompts = target.prompts()
    with engine(**target.options, max_logprobs=-1) as llm:
        encode = llm.get_tokenizer().encode
        requests = []
        for i, node in some:
            written = prompts[i]["prompt"] if i in SIZES else prompts[i]
            # the prompt as it was written, with one token for each image
            ids = encode(written) + after(i, node)[len(outputs[i].prompt_token_ids) :]
            own = {"prompt_token_ids": ids}
            if i in SIZES:
                own["multi_modal_data"] = prompts[i]["multi_modal_data"]
            requests.append(own)
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
        rows = llm.generate(requests, params, use_tqdm=False)
    for (_, node), row in zip(some, rows, strict=True):
        (entries,) = row.outputs[0].logprobs
        expected = torch.tensor([entries[token].logprob for token in range(len(entries))])
        found = node.processed.log_softmax(-1)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_a_seed_gives_plain_decodings_text(target):
    """With `match`: the draws at every node are the ones that plain decoding makes."""
    prompts = target.prompts()
    with plain_engine(**target.options) as llm:
        expected = token_ids(llm.generate(prompts, SEEDED, use_tqdm=False))
    with engine("binary:3", **target.options, verification="match") as llm:
        answers = token_ids(llm.generate(prompts, SEEDED, use_tqdm=False))
    assert answers == expected


def test_without_images(target):
    """A target that the engine's limits leave text only."""
    limits = target.options.get("limit_mm_per_prompt", {}) | {"image": 0}
    options = target.options | {"limit_mm_per_prompt": limits}
    with engine(**options) as llm:
        expected = token_ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    with engine("binary:3", **options) as llm:
        assert not model_runner(llm).supports_mm_inputs
        assert token_ids(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def test_drafts_from_the_text_itself(target, plain):
    spec = {"proposer": "ngram", "model": None}
    with engine("caterpillar:4:2", **target.options, draft=None, spec=spec) as llm:
        answers = token_ids(llm.generate(target.prompts(), GREEDY, use_tqdm=False))
        metrics = spec_metrics(llm)
    assert answers == plain
    assert metrics["num_accepted_tokens"] > 0


def test_a_member_reads_the_text_alone(target):
    """Contrastive decoding whose amateur sees no images, at nodes of requests with and without."""
    spec = {"type": "contrastive", "beta": 0.5, "alpha": 0.1}
    options = target.options | {"spec": {"target_distribution": spec}}
    with recorded_nodes() as nodes, engine("binary:2", **options) as llm:
        outputs = llm.generate(target.prompts(), SEEDED, use_tqdm=False)
    by_request = {output.request_id: i for i, output in enumerate(outputs)}
    texts = [[*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs]
    seen = set()
    for node in nodes[::13]:
        i = by_request[request_of(node.req_id)]
        text = [*texts[i][: node.root_position + 1], *node.path_tokens]
        (q,) = member_rows(text, [DRAFT])
        expected = combined_row([node.logits, q[-1]], spec, text, [], SEEDED).softmax(0)
        found = node.processed.double().softmax(0)
        assert (found - expected).abs().max() < 1e-4
        seen.add((i in SIZES, len(node.path_tokens)))
    assert seen == {(pictured, depth) for pictured in (False, True) for depth in range(3)}
