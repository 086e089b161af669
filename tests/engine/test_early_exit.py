# SPDX-License-Identifier: Apache-2.0
"""The target's first layers as the draft: its rows, what it writes, and that nothing is lost."""

from functools import partial

import pytest
import torch
from model_families import CUTTABLE, FAMILIES
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from helpers import layerskip, models
from helpers.distributions import LENGTHS, assert_prefixes_follow, next_token
from helpers.engines import engine, greedy_params, model_runner, token_ids
from helpers.metrics import spec_metrics
from helpers.oracle import reference_exit, reference_model, tokens_of
from helpers.pair import EXIT_TARGET, PROMPTS
from helpers.recording import recorded_nodes, request_of
from vllm_spechub.attention.cpu_backend import cache_views
from vllm_spechub.integration.refusals import Unsupported
from vllm_spechub.proposers.early_exit import EarlyExitProposer

EXIT = 2
ALWAYS = ("Gemma 3", "Mixtral")
SPEC = {"proposer": "early_exit", "exit_layer": EXIT}


def early_exit(tree="binary:3", model=EXIT_TARGET, exit_layer=EXIT, **options):
    spec = SPEC | {"exit_layer": exit_layer}
    return engine(tree, model=model, draft=None, spec=spec, verification="traversal", **options)


def assert_first_layers(nodes, outputs, model, exit_layer=EXIT):
    """The draft's rows are those of transformers' first layers."""
    texts = {o.request_id: [*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs}
    reference = reference_exit(model, exit_layer)
    for node in nodes:
        text = texts[request_of(node.req_id)][: node.root_position + 1]
        row = reference(input_ids=torch.tensor([[*text, *node.path_tokens]])).logits[0, -1]
        torch.testing.assert_close(node.draft_logits, row, atol=2e-4, rtol=1e-4)


@pytest.fixture
def written(monkeypatch):
    """For each step, what drafting has changed in the target's caches: whether it was all in slots
    of the roots and nodes of requests that decode, in the first layers; and how many slots."""
    steps: list[tuple[bool, int]] = []
    propose = EarlyExitProposer.propose

    def spy(self, input_batch, *args, dummy_run=False, **options):
        if dummy_run:
            return propose(self, input_batch, *args, dummy_run=True, **options)
        layers = self.vllm_config.compilation_config.static_forward_context
        before = {name: layer.kv_cache.clone() for name, layer in layers.items()}
        drafted = propose(self, input_batch, *args, **options)
        allowed = set()
        step = self._step(input_batch, args[5], args[2], None, False, False)
        for r, root in enumerate(step.root_positions.tolist()):
            req = int(input_batch.idx_mapping[r])
            if root < int(self.req_states.prefill_len.gpu[req]):
                continue
            table = self.block_tables.input_block_tables[0][r]
            size = self.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
            slots = range(root, min(root + self.config.tree.num_nodes + 1, self.max_model_len))
            allowed |= {(int(table[slot // size]), slot % size) for slot in slots}
        clean, count = True, 0
        for name, layer in layers.items():
            views = zip(cache_views(layer.kv_cache), cache_views(before[name]), strict=True)
            # [num_blocks, block_size, num_kv_heads, head_size]
            differ = torch.stack([(new != old).any(-1).any(-1) for new, old in views]).any(0)
            changed = {tuple(place) for place in differ.nonzero().tolist()}
            clean &= changed <= (allowed if name in self.draft_attn_layer_names else set())
            count += len(changed)
        steps.append((clean, count))
        return drafted

    monkeypatch.setattr(EarlyExitProposer, "propose", spy)
    return steps


def test_nothing_below_the_roots_is_written(written):
    """With chunked prefill, preemption, prefix hits, steps without a tree, and trees that are cut:
    plain vLLM's tokens, and of the target's cache only what verification writes again."""
    schedule = [[1, 3, "binary:3"], [4, 4, None], [5, None, "chain:2"]]
    options = {"block_size": 32, "num_gpu_blocks_override": 14, "max_num_batched_tokens": 41}
    with early_exit(schedule, **options) as llm:
        outputs = llm.generate(PROMPTS, greedy_params(60), use_tqdm=False)
        longer = [
            {"prompt_token_ids": [*o.prompt_token_ids, *o.outputs[0].token_ids[:50]]}
            for o in outputs
        ]
        again = llm.generate(longer, greedy_params(60), use_tqdm=False)
        preemptions = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
        metrics = spec_metrics(llm)
        names = model_runner(llm).speculator.draft_attn_layer_names
    with engine(model=EXIT_TARGET, enable_prefix_caching=False) as llm:
        for found, prompts in ((outputs, PROMPTS), (again, longer)):
            answers = llm.generate(prompts, greedy_params(60), use_tqdm=False)
            assert token_ids(found) == token_ids(answers)
    assert preemptions[0] > 0
    assert any(o.num_cached_tokens >= 32 for o in again)
    assert metrics["num_accepted_tokens"] > 0.8 * metrics["num_drafts"]
    assert names == {f"model.layers.{i}.self_attn.attn" for i in range(EXIT)}
    assert all(clean for clean, _ in written)
    assert sum(count > 0 for _, count in written) > 40


def test_rows_and_distribution():
    """The draft's rows are those of transformers' first layers; what is emitted follows the
    target."""
    prompt = tokens_of(PROMPTS[4])
    greedy = greedy_params(12, ignore_eos=True)
    params = SamplingParams(n=800, max_tokens=LENGTHS[-1], ignore_eos=True, temperature=0.8)
    options = {"max_num_seqs": 128, "max_num_batched_tokens": 4096}
    with early_exit(**options) as llm:
        with recorded_nodes() as nodes:
            outputs = llm.generate(PROMPTS[2:], greedy, use_tqdm=False)
        before = spec_metrics(llm)
        output = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0]
        metrics = spec_metrics(llm)
    drafts, accepted = (metrics[k] - before[k] for k in ("num_drafts", "num_accepted_tokens"))
    assert accepted > drafts
    assert_prefixes_follow(output, prompt, params, partial(next_token, model=EXIT_TARGET))

    inner = [node for node in nodes if node.draft_logits is not None]
    assert {len(node.path_tokens) for node in inner} == {0, 1, 2}
    assert_first_layers(inner[::5], outputs, EXIT_TARGET)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, id=f.name, marks=() if f.name in ALWAYS else pytest.mark.all_families)
        for f in FAMILIES
        if f.name in CUTTABLE
    ],
)
def test_families(family, tmp_path):
    """A layer of two, in sliding windows and with experts, too."""
    target, _ = models.pair(family, tmp_path)
    params = greedy_params(20, ignore_eos=True)
    with early_exit(model=target, exit_layer=1) as llm, recorded_nodes() as nodes:
        outputs = llm.generate(PROMPTS[2:], params, use_tqdm=False)
        runner = model_runner(llm)
        early = runner.speculator.draft_attn_layer_names
    assert len(early) == 1
    with engine(model=target) as llm:
        assert token_ids(outputs) == token_ids(llm.generate(PROMPTS[2:], params, use_tqdm=False))
    # transformers runs no W8A8 here, and beyond a window even its whole Cohere 2 gives other rows
    if family.weights == "float32" and family.made_by != "Cohere2":
        inner = [node for node in nodes if node.draft_logits is not None]
        assert_first_layers(inner[::40], outputs, target, 1)


@pytest.mark.parametrize("stored", layerskip.STORED)
def test_layerskips_checkpoints(stored, tmp_path):
    """As they are published and as training recipes write them, through vLLM's own loading: the
    rows of transformers' first layers, and the tokens of the whole."""
    params = greedy_params(12, ignore_eos=True)
    target = layerskip.store(stored, tmp_path / "target")
    with early_exit("binary:2", model=target) as llm, recorded_nodes() as nodes:
        outputs = llm.generate(PROMPTS[3:], params, use_tqdm=False)
    if not list(tmp_path.glob("target/model*")):  # a format that transformers does not load
        target = layerskip.store("llama2-7B", tmp_path / "same weights")
    for output in outputs:
        (answer,) = token_ids([output])
        text = torch.tensor([[*output.prompt_token_ids, *answer[:-1]]])
        rows = reference_model(target)(input_ids=text).logits[0, -len(answer) :]
        assert rows.argmax(-1).tolist() == answer
    inner = [node for node in nodes if node.draft_logits is not None]
    assert len(inner) > 40
    assert_first_layers(inner[::5], outputs, target)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ({"exit_layer": 8}, {}, "speculative_config['exit_layer'] is 8, allowed: a whole number"),
        ({"exit_layer": 0}, {}, "speculative_config['exit_layer'] is 0, allowed: a whole number"),
        ({"exit_layer": True}, {}, "speculative_config['exit_layer'] is True, allowed"),
        ({"exit_layer": "2"}, {}, "speculative_config['exit_layer'] is '2', allowed"),
        ({}, {}, "speculative_config['exit_layer'] is missing"),
        (
            {"exit_layer": 2, "model": EXIT_TARGET},
            {},
            "but proposer 'early_exit' loads no model; leave it out",
        ),
        ({"exit_layer": 2}, {"enable_lora": True}, "enable_lora with proposer 'early_exit'"),
    ],
)
def test_refusals(spec, options, message):
    load_general_plugins()
    spec = {"method": "spechub", "proposer": "early_exit"} | spec
    with pytest.raises((Unsupported, ValueError)) as error:
        EngineArgs(
            model=EXIT_TARGET, dtype="float32", speculative_config=spec, **options
        ).create_engine_config()
    (line,) = [line for line in str(error.value).splitlines() if message in line]
    assert line


def test_a_target_that_is_not_cut(tmp_path):
    (family,) = (family for family in FAMILIES if family.name == "OLMo 2")
    models.configured(family, tmp_path)
    load_general_plugins()
    spec = {"method": "spechub", "proposer": "early_exit", "exit_layer": 1}
    with pytest.raises((Unsupported, ValueError)) as error:
        EngineArgs(
            model=str(tmp_path), dtype="float32", speculative_config=spec
        ).create_engine_config()
    why = "cannot cut Olmo2ForCausalLM after some of its layers"
    assert [line for line in str(error.value).splitlines() if why in line]
