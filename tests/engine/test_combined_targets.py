# SPDX-License-Identifier: Apache-2.0
"""Combined targets in real engines, against models in transformers that are combined plainly.

Each engine meets several of the situations in which the draft's cache could be wrong, with one of
the types of target distributions.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from helpers import models
from helpers.distributions import LENGTHS, assert_prefixes_follow
from helpers.engines import engine, greedy_params, token_ids
from helpers.ensembles import combined_row, greedy_ensemble, known, member_rows, models_of
from helpers.metrics import spec_metrics
from helpers.oracle import reference_model, resolved, tokens_of
from helpers.pair import DRAFT, EAGLE3, EXIT_TARGET, PROMPTS, TARGET
from helpers.recording import recorded_nodes, request_of
from vllm_spechub.engine.combination import Combination
from vllm_spechub.engine.model_state import TreeModelState
from vllm_spechub.trees.tree import TokenTree

MIXTURE = {"type": "mixture", "weight": 0.3, "members": [{"model": EXIT_TARGET, "weight": 0.25}]}
# proxy tuning, with the draft as the expert
PROXY = {"type": "logits", "weight": 0.5, "members": [{"model": EXIT_TARGET, "weight": -0.5}]}
CONTRASTIVE = {"type": "contrastive", "beta": 0.5, "alpha": 0.1}
NO_TREES = [[1, 512, None], [513, None, "chain:1"]]
WIDE = [0, 0, 0, 0, 1, 1, 2, 5]
COUNT = 32


def combining(tree, target, **options):
    spec = {"target_distribution": target} | options.pop("spec", {})
    return engine(tree, spec=spec, **options)


def greedy(count=COUNT, **extra_args):
    return greedy_params(count, ignore_eos=True, extra_args=extra_args)


def answers(llm, params) -> list[list[int]]:
    return token_ids(llm.generate(PROMPTS, params, use_tqdm=False))


def ensemble(spec, **options) -> list[list[int]]:
    found = [greedy_ensemble(tokens_of(prompt), spec, COUNT, **options) for prompt in PROMPTS]
    assert min(margin for _, margin in found) > 1e-4  # else rounding may decide
    return [text for text, _ in found]


def metric(llm, name: str) -> float:
    return next(m.value for m in llm.get_metrics() if m.name == name)


@dataclass
class Asked:
    """A request in one step, after the member passes."""

    req_id: str
    root: int
    # of each row, the tokens from the root's child
    paths: list[tuple[int, ...]]
    # by member: keys and values of each layer up to the root, [num_tokens, num_heads, head_size];
    # empty in most steps
    caches: list[list[torch.Tensor]]


@dataclass
class Step:
    """What the member passes of one step gave."""

    requests: list[Asked]
    # of each member, [num_rows, vocab_size]
    rows: list[torch.Tensor]


@pytest.fixture
def steps(monkeypatch) -> list[Step]:
    """Every step with member passes; with the caches in every third of them."""
    seen, states = [], []
    read, custom_sampler = Combination.read, TreeModelState.custom_sampler

    def keep_state(self, sampler):
        states.append(self)
        return custom_sampler(self, sampler)

    def cached(member, r: int, length: int) -> list[torch.Tensor]:
        layers = member.vllm_config.compilation_config.static_forward_context
        cache_views, _ = states[-1].platform.cache_kernels()
        (table,) = states[-1].compactor.block_tables.input_block_tables
        slots, held = np.arange(length), []
        for name in sorted(member.layer_names, key=lambda name: int(name.split(".")[-3])):
            for view in cache_views(layers[name].kv_cache):
                blocks = table[r][slots // view.shape[1]].long()
                held.append(view[blocks, slots % view.shape[1]].view(torch.float32))
        return held

    def spy(self, batch):
        read(self, batch)
        if self.rows is None:
            return
        trees, requests = states[-1].request_trees.trees_for(batch.idx_mapping_np), []
        tokens = batch.input_ids[batch.logits_indices].tolist()
        looked = self.members if len(seen) % 3 == 0 else []
        for r, req_id in enumerate(batch.req_ids):
            start, end = batch.cu_num_logits_np[r : r + 2].tolist()
            paths = [
                tuple(tokens[start + i] for i in path[1:]) for path in trees[r].paths[: end - start]
            ]
            root = int(batch.positions[batch.logits_indices[start]])
            caches = [cached(member, r, root + 1) for member in looked]
            requests.append(Asked(req_id, root, paths, caches))
        seen.append(Step(requests, [rows.clone() for rows in self.rows]))

    monkeypatch.setattr(Combination, "read", spy)
    monkeypatch.setattr(TreeModelState, "custom_sampler", keep_state)
    return seen


def assert_members_read_plainly(
    steps: list[Step], texts: dict[str, list[int]], members: list[str], every: int
) -> None:
    """Compare rows and caches of member passes with those of each model, which reads the texts
    plainly."""
    depths, lengths, number = set(), set(), 0
    for step in steps:
        row = 0
        for asked in step.requests:
            text = texts[request_of(asked.req_id)][: asked.root + 1]
            assert len(text) == asked.root + 1
            for path in asked.paths:
                if number % every == 0:
                    wanted = member_rows([*text, *path], members)
                    for expected, rows in zip(wanted, step.rows, strict=True):
                        found = rows[row]
                        told = found[: len(expected[-1])]
                        torch.testing.assert_close(told, expected[-1], atol=2e-4, rtol=1e-4)
                        assert (found[len(told) :] == -torch.inf).all()
                    depths.add(len(path))
                row += 1
                number += 1
            if asked.caches and number % 5 == 0:
                lengths.add(len(text))
                for model, held in zip(members, asked.caches, strict=True):
                    plain = reference_model(model)(input_ids=known(text, model), use_cache=True)
                    both = [
                        kv[0].transpose(0, 1)
                        for layer in plain.past_key_values.layers
                        for kv in (layer.keys, layer.values)
                    ]
                    torch.testing.assert_close(held, both, atol=3e-4, rtol=1e-3)
        assert all(row == len(rows) for rows in step.rows)
    assert depths == {0, 1, 2, 3}
    assert len(lengths) > 3


def texts_of(outputs) -> dict[str, list[int]]:
    return {o.request_id: [*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs}


def test_logits_with_truncated_trees_and_preemption(steps, tmp_path):
    """Prompts in chunks, trees cut by the budget, and requests that lose their blocks; the other
    models lack some of the target's tokens."""
    target = models.padded(tmp_path / "target", TARGET, 2056)
    expected = ensemble(PROXY, target=target)
    fewer = ({"weight": 0.5}, {"members": PROXY["members"]}, {"weight": 0.0})
    for other in fewer:
        assert ensemble({"type": "logits"} | other, target=target) != expected
    options = {"max_num_batched_tokens": 40, "max_model_len": 192, "num_gpu_blocks_override": 7}
    with combining("binary:3", PROXY, model=target, block_size=32, **options) as llm:
        outputs = llm.generate(PROMPTS, greedy(), use_tqdm=False)
        assert token_ids(outputs) == expected
        assert metric(llm, "vllm:num_preemptions") > 0
    whole, texts = len(TokenTree.parse("binary:3").parents) + 1, texts_of(outputs)
    prompts = {o.request_id: len(o.prompt_token_ids) for o in outputs}
    cut = [
        len(asked.paths)
        for step in steps
        for asked in step.requests
        if 1 < len(asked.paths) < whole and asked.root >= prompts[request_of(asked.req_id)]
    ]
    assert cut
    assert_members_read_plainly(steps, texts, models_of(PROXY)[1:], every=23)


def test_mixture_with_prefix_hits_and_a_schedule(steps):
    """Answers beside each other that differ in what they combine, steps without trees, and prompts
    whose beginnings are in the cache, written in steps with and without a tree."""
    expected, alone = ensemble(MIXTURE), ensemble({"type": "mixture", "weight": 0.0})
    of_member = ensemble({"type": "mixture", "members": [{"model": EXIT_TARGET, "weight": 0.9}]})
    schedule = [[1, 2, "chain:2"], [3, 4, None], [5, None, "binary:3"]]
    params = [
        greedy(),
        greedy(target_distribution="off"),
        greedy(target_weight=0.0, target_member_weights=[0.9]),
    ] * 2
    options = {"max_num_batched_tokens": 64, "block_size": 32, "enable_prefix_caching": True}
    with combining(schedule, MIXTURE, **options) as llm:
        asked = [p.clone() for p in params]
        for i, p in enumerate(asked):
            p.max_tokens = 14 + 3 * i
        found = answers(llm, asked)
        answering = [expected, alone, of_member] * 2
        wanted = [texts[i] for i, texts in enumerate(answering)]
        assert found == [text[: p.max_tokens] for text, p in zip(wanted, asked, strict=True)]
        # the same texts again, some of their tokens now as prompts
        longer = [[*tokens_of(p), *text[:10]] for p, text in zip(PROMPTS, expected, strict=True)]
        prompts = [{"prompt_token_ids": tokens} for tokens in longer]
        again = llm.generate(prompts, greedy(COUNT - 10), use_tqdm=False)
        assert token_ids(again) == [text[10:] for text in expected]
        assert metric(llm, "vllm:prefix_cache_hits") > 0
        assert {len(asked.paths) for step in steps for asked in step.requests} >= {1, 3, 15}

        for extra_args in (
            {"target_weight": 0.8},
            {"target_member_weights": [0.1, 0.1]},
            {"target_beta": 1},
            {"target_distribution": "x"},
        ):
            with pytest.raises(VLLMValidationError, match=r"^extra_args: [^\n]*allowed:"):
                llm.generate(PROMPTS[:1], greedy(**extra_args), use_tqdm=False)
        assert answers(llm, greedy(target_distribution="off"))[2] == alone[2]

        # raw log-probabilities are the target's
        params = SamplingParams(temperature=0, max_tokens=8, logprobs=2, prompt_logprobs=1)
        output = llm.generate(PROMPTS[4], params, use_tqdm=False)[0]
        text = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        plain = reference_model()(input_ids=torch.tensor([text])).logits[0].log_softmax(1)
        reported = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        for row, entries in zip(plain, reported, strict=False):
            for token, entry in entries.items():
                assert entry.logprob == pytest.approx(row[token].item(), abs=1e-3)


PENALTIES = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3}
EDITED = [
    {"temperature": 0.0},
    {"temperature": 0.8, **PENALTIES, "min_tokens": 9},
    {"temperature": 0.0, "bad_words": [" stream", "self"], "logit_bias": {289: 3.0, 12: -5.0}},
    {"temperature": 0.6, "top_k": 5, "extra_args": {"target_distribution": "off"}},
    {"temperature": 1.3, "top_p": 0.8, "min_p": 0.02},
    # none of these tokens is plausible beside the best ones: p is left, among them
    {"temperature": 1.0, "allowed_token_ids": [5, 6, 7, 600, 601]},
]


@pytest.mark.parametrize(
    ("target", "tree"), [(MIXTURE, WIDE), (CONTRASTIVE, "binary:3")], ids=lambda x: str(x)[:24]
)
def test_parameters_and_distribution(target, tree):
    """Every node's row with the sampling parameters of its request, processed log-probabilities,
    and by chi-square what is drawn: the first tokens without a tree, the others through trees."""
    prompt = tokens_of(PROMPTS[4])
    params = [
        SamplingParams(seed=i, max_tokens=16, ignore_eos=True, logprobs=1, **options)
        for i, options in enumerate(EDITED)
    ]
    drawn = SamplingParams(n=600, temperature=1.0, max_tokens=LENGTHS[-1], ignore_eos=True)
    options = {
        "max_num_seqs": 128,
        "max_num_batched_tokens": 4096,
        "logprobs_mode": "processed_logprobs",
        "verification": "traversal",
    }
    with combining(tree, target, **options) as llm:
        with recorded_nodes() as nodes:
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        sampled = llm.generate({"prompt_token_ids": prompt}, drawn, use_tqdm=False)[0]
        assert spec_metrics(llm)["num_accepted_tokens"] > 0.3 * drawn.n
    lengths = {o.request_id: len(o.prompt_token_ids) for o in outputs}
    texts, asked = texts_of(outputs), dict(zip(lengths, map(resolved, params), strict=True))

    used = models_of(target)

    def row_after(rows, history, request):
        text, edits = (history[: lengths[request]], history[lengths[request] :]), asked[request]
        plain = edits.clone()
        plain.extra_args = None
        if edits.extra_args:
            return combined_row(rows[:1], {"type": "mixture"}, *text, plain)
        return combined_row(rows, target, *text, plain)

    assert len(nodes) > 300
    for node in nodes[::5]:
        request = request_of(node.req_id)
        history = [*texts[request][: node.root_position + 1], *node.path_tokens]
        rows = [rows[-1] for rows in member_rows(history, used)]
        expected = row_after(rows, history, request).softmax(0)
        found = (node.processed / (node.temperature or 1.0)).double().softmax(0)
        differ = (found - expected).abs() > 1e-4
        assert differ.sum() <= 1  # a token at the edge of a truncation
        assert (found - expected).abs().sum() < 0.02 or not differ.any()
    for output in outputs:
        read = member_rows(texts[output.request_id], used)
        for i, entries in enumerate(output.outputs[0].logprobs):
            at = lengths[output.request_id] + i
            history = texts[output.request_id][:at]
            rows = [each[at - 1] for each in read]
            row = row_after(rows, history, output.request_id).log_softmax(0)
            token = texts[output.request_id][at]
            assert entries[token].logprob == pytest.approx(row[token].item(), abs=2e-3)

    def distribution(prompt, prefixes, params):
        after = [member_rows([*prompt, *prefix], used) for prefix in prefixes]
        rows = [[each[-1] for each in read] for read in after]
        return torch.stack(
            [
                combined_row(each, target, prompt, list(prefix), params).softmax(0)
                for each, prefix in zip(rows, prefixes, strict=True)
            ]
        )

    assert_prefixes_follow(sampled, prompt, drawn, distribution)
    with pytest.raises(AssertionError, match="p = "):
        assert_prefixes_follow(sampled, prompt, drawn)  # the target's own is another


AMATEUR = CONTRASTIVE | {"members": [{"model": DRAFT}]}


def test_a_seeds_text_with_and_without_trees():
    """With `match`, in steps of which none has a tree, with trees, and with trees of drafts that
    are no members: sampling parameters and grammars change the same rows in all of them."""
    params = [
        SamplingParams(seed=i, max_tokens=16, ignore_eos=True, **options)
        for i, options in enumerate(EDITED[:4])
    ] + [
        SamplingParams(
            seed=7,
            max_tokens=16,
            structured_outputs=StructuredOutputsParams(regex=regex),
        )
        for regex in (r"[a-z_]{4,30}", r"[0-9 ]{3,9}")
    ]
    texts = []
    for tree, target, spec in (
        (NO_TREES, CONTRASTIVE, {}),
        ("binary:3", CONTRASTIVE, {}),
        ("binary:3", AMATEUR, {"model": EXIT_TARGET}),
        ("binary:2", AMATEUR, {"model": EAGLE3}),
        ("caterpillar:6:2", AMATEUR, {"model": None, "proposer": "ngram"}),
        ("chain:2", AMATEUR, {"model": None, "proposer": "early_exit", "exit_layer": 2}),
    ):
        options = {"verification": "match", "async_scheduling": True}
        with combining(tree, target, spec=spec, **options) as llm:
            texts.append(answers(llm, params))
            assert (spec_metrics(llm)["num_drafts"] > 0) == (tree != NO_TREES)
    assert all(text == texts[0] for text in texts[1:])
