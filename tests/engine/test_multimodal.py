# SPDX-License-Identifier: Apache-2.0
"""Targets whose prompts have images, with a draft that reads text only.

The requests of a batch are with one image, with two, and without.
"""

import json
import os
import re
import sys
from base64 import b64encode
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import openai
import pytest
import torch
from typer.testing import CliRunner
from vllm import SamplingParams
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.sched.scheduler import Scheduler

from helpers import multimodal
from helpers.distributions import LENGTHS, assert_prefixes_follow
from helpers.engines import engine, greedy_params, model_runner, plain_engine, token_ids
from helpers.ensembles import combined_row, member_rows
from helpers.metrics import spec_metrics
from helpers.multimodal import ROWS, SIZES, image
from helpers.oracle import reference_exit, reference_model
from helpers.pair import DRAFT, PAIR, PROMPTS, TARGET
from helpers.recording import Node, recorded_nodes, request_of
from helpers.serving import fetch, serving
from vllm_spechub.cli import app
from vllm_spechub.engine.model_state import TreeModelState
from vllm_spechub.offline.simulation.rows import TreeRows
from vllm_spechub.offline.simulation.texts import ModelPair, Roots

GREEDY = greedy_params(24, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=5, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def importable():
    with multimodal.importable():
        yield


@pytest.fixture(
    scope="module",
    params=["llava", "qwen2_vl", pytest.param("qwen2_5_vl", marks=pytest.mark.all_families)],
)
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


@pytest.fixture
def images(monkeypatch) -> Counter:
    """How many images a step's chunk has cut, and how many were dropped to make room for others."""
    seen: Counter = Counter()
    schedule, freed = Scheduler.schedule, EncoderCacheManager.get_freed_mm_hashes

    def spy(self, *args, **kwargs):
        before = {name: request.num_computed_tokens for name, request in self.requests.items()}
        output = schedule(self, *args, **kwargs)
        for name, count in output.num_scheduled_tokens.items():
            request = self.requests[name]
            end = count + (before[name] or request.num_computed_tokens - count)
            places = [feature.mm_position for feature in request.mm_features]
            seen["cut"] += sum(p.offset < end < p.offset + p.length for p in places)
        return output

    def spy_on_freed(self):
        hashes = freed(self)
        seen["dropped"] += len(hashes)
        return hashes

    monkeypatch.setattr(Scheduler, "schedule", spy)
    monkeypatch.setattr(EncoderCacheManager, "get_freed_mm_hashes", spy_on_freed)
    return seen


@pytest.mark.parametrize("scheduling", [False, True])
def test_greedy(target, plain, scheduling, images):
    """In chunks that end within images, with little memory for the cache and for images, then
    again from the prefix cache."""
    options = {"max_num_batched_tokens": 40, "max_model_len": 192, "block_size": 32}
    options |= target.options | {"async_scheduling": scheduling, "num_gpu_blocks_override": 7}
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
    assert images["cut"] > 0
    assert images["dropped"] > 0
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


SAMPLES = 600


@pytest.mark.parametrize(
    "target",
    ["llava", pytest.param("qwen2_vl", marks=pytest.mark.all_families)],
    indirect=True,
)
def test_what_is_emitted_follows_a_target_that_has_seen_images(target):
    """By chi-square, against the most probable tokens of plain vLLM."""
    kept = 5
    params = SamplingParams(
        n=SAMPLES, top_k=kept, temperature=1.0, max_tokens=LENGTHS[-1], ignore_eos=True
    )
    options = target.options | {"max_num_seqs": 128, "max_num_batched_tokens": 4096}
    with engine("binary:3", verification="traversal", **options) as llm:
        output = llm.generate(target.prompts()[1], params, use_tqdm=False)[0]
        assert spec_metrics(llm)["num_accepted_tokens"] > 0.2 * SAMPLES
    with engine(**options) as llm:
        written, one = target.prompts()[1], SamplingParams(max_tokens=1, logprobs=kept)

        def distribution(prompt, prefixes, params):
            images = {k: v for k, v in written.items() if k != "prompt"}
            requests = [images | {"prompt_token_ids": [*prompt, *prefix]} for prefix in prefixes]
            rows = torch.full((len(requests), ROWS), -torch.inf, dtype=torch.float64)
            for row, answer in zip(rows, llm.generate(requests, one, use_tqdm=False), strict=True):
                for token, entry in answer.outputs[0].logprobs[0].items():
                    if entry.rank <= kept:
                        row[token] = entry.logprob
            return rows.softmax(-1)

        prompt = llm.get_tokenizer().encode(written["prompt"])
        assert_prefixes_follow(output, prompt, params, distribution)
        del written["multi_modal_data"]
        prompt = llm.get_tokenizer().encode(PROMPTS[1])
        with pytest.raises(AssertionError):
            assert_prefixes_follow(output, prompt, params, distribution)


def test_a_seed_gives_plain_decodings_text(target):
    """With `match`: the draws at every node are the ones that plain decoding makes."""
    prompts = target.prompts()
    with plain_engine(**target.options) as llm:
        expected = token_ids(llm.generate(prompts, SEEDED, use_tqdm=False))
    with engine("binary:3", **target.options, verification="match") as llm:
        answers = token_ids(llm.generate(prompts, SEEDED, use_tqdm=False))
    assert answers == expected


@pytest.mark.parametrize("target", ["qwen2_vl"], indirect=True)
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


def test_the_targets_first_layers_draft(target, plain):
    """Of a target whose positions have one dimension; with others, one line says why not."""
    spec = {"proposer": "early_exit", "exit_layer": 1}
    options = {"max_num_batched_tokens": 64, "block_size": 32, "num_gpu_blocks_override": 9}
    early_exit = engine("binary:3", draft=None, spec=spec, **options | target.options)
    if target.has_mrope:
        with (
            pytest.raises(ValueError, match=r"\(M-RoPE\).*use a text draft as 'model'"),
            early_exit,
        ):
            pass
        return
    with recorded_nodes() as nodes, early_exit as llm:
        outputs = llm.generate(target.prompts(), GREEDY, use_tqdm=False)
        assert spec_metrics(llm)["num_accepted_tokens"] > 10
    assert token_ids(outputs) == plain
    texts = {
        output.request_id: [*output.prompt_token_ids, *output.outputs[0].token_ids]
        for i, output in enumerate(outputs)
        if i not in SIZES
    }
    inner = [node for node in nodes if node.draft_logits is not None]
    blind = [node for node in inner if request_of(node.req_id) in texts]
    assert len(inner) > len(blind) > 40
    for node in blind[::5]:
        text = texts[request_of(node.req_id)][: node.root_position + 1]
        tokens = torch.tensor([[*text, *node.path_tokens]]).clamp(max=2047)
        row = reference_exit(TARGET, 1)(input_ids=tokens).logits[0, -1]
        torch.testing.assert_close(node.draft_logits[:2048], row, atol=2e-4, rtol=1e-4)


def test_the_commands_read_its_texts(target, tmp_path):
    """Without images it has the demo target's rows at nodes. As a draft it is refused."""
    pair = ModelPair.load(target.folder, DRAFT, "cpu", torch.float32)
    texts, tokens = (
        pair.encode(PROMPTS[4], 99).expand(2, -1),
        torch.tensor([[5, 278, 9], [7, 8, 289]]),
    )
    roots = Roots(texts, torch.tensor([0, 1]), torch.tensor([6, 11]))
    rows = []
    for model in (pair.target, reference_model(TARGET)):
        reader = TreeRows(model, roots)
        reader.read(texts[:, :1], tokens)
        rows.append(reader.read(tokens, torch.zeros_like(tokens))[..., :2048])
    torch.testing.assert_close(*rows, atol=2e-4, rtol=1e-4)

    prompts = ["--prompts", str(PAIR / "prompts.jsonl"), "--limit", "1"]
    few = [*prompts, "--texts", "2", "--tokens", "8"]
    run = CliRunner().invoke
    for command in (["simulate", *few, "-r", "traversal", "-n", "4", "-T", "1"], ["shape", *few]):
        done = run(app, [command[0], target.folder, DRAFT, *command[1:]])
        assert done.exit_code == 0, done.output
        assert "auto:" in done.output or "tokens" in done.output
        done = run(app, [command[0], target.folder, target.folder, *command[1:]])
        assert done.exit_code == 2
        (line,) = [line for line in done.output.splitlines() if "multimodal" in line]
        assert "but a draft reads text only" in line


PROGRAM = """
from helpers.multimodal import importable
from vllm.entrypoints.cli.main import main

within = importable()
within.__enter__()  # also in the processes that this one spawns, which read this file again
if __name__ == "__main__":
    main()
"""


@pytest.mark.all_families
def test_a_server_with_images_beside_texts(target, tmp_path):
    """`vllm serve`, asked through OpenAI's client, all at once: plain vLLM's texts."""
    pictures = [image(i, 4 * i + 4, 8) for i in range(3)]
    asked = [[(PROMPTS[0], pictures[0])], [(PROMPTS[2], None)], [(PROMPTS[4], pictures[1])]]
    asked += [[(PROMPTS[3], None)], [(PROMPTS[0], pictures[0]), (PROMPTS[4], pictures[2])]]

    def messages(parts) -> list[dict]:
        content = []
        for text, picture in parts:
            if picture is not None:
                file = BytesIO()
                picture.save(file, "PNG")
                url = f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
                content.append({"type": "image_url", "image_url": {"url": url}})
            content.append({"type": "text", "text": text})
        return [{"role": "user", "content": content}]

    conversations = [messages(parts) for parts in asked]
    with engine(**target.options) as llm:
        outputs = llm.chat(conversations, GREEDY, use_tqdm=False)
    expected = [output.outputs[0].text for output in outputs]

    options = {"dtype": "float32", "max-model-len": 256, "max-num-seqs": 8}
    options |= {"kv-cache-memory-bytes": 64 << 20, "served-model-name": "images"}
    spec = {"method": "spechub", "model": DRAFT, "tree": "binary:3"}
    (tmp_path / "serve.py").write_text(PROGRAM)
    command = [sys.executable, tmp_path / "serve.py", "serve", target.folder, "--enforce-eager"]
    command += [f"--{name}={value}" for name, value in options.items()]
    command += ["--limit-mm-per-prompt", json.dumps({"image": 2, "video": 0})]
    command += ["--speculative-config", json.dumps(spec)]
    with (
        serving(command, tmp_path / "log", PYTHONPATH=os.pathsep.join(sys.path)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=120) as client,
        ThreadPoolExecutor(len(asked)) as pool,
    ):

        def answer(conversation) -> str:
            reply = client.chat.completions.create(
                model="images",
                messages=conversation,
                temperature=0,
                max_tokens=GREEDY.max_tokens,
                extra_body={"ignore_eos": True},
            )
            return reply.choices[0].message.content

        assert [*pool.map(answer, conversations)] == expected
        metrics = fetch(f"{address}/metrics")
    (accepted,) = re.findall(r"^vllm:spec_decode_num_accepted_tokens_total.* (.*)", metrics, re.M)
    assert float(accepted) > 10


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
