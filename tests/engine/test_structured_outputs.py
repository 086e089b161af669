# SPDX-License-Identifier: Apache-2.0
"""Requests with grammars decode over trees, and answer as plain vLLM does."""

import json
from functools import cache

import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from helpers.distributions import LENGTHS, SAMPLES, assert_prefixes_follow, next_token
from helpers.engines import engine, greedy_params, token_ids
from helpers.grammars import GRAMMARS, TOKENIZER, EndsAtPunctuation, Oracle, allowed
from helpers.metrics import spec_metrics
from helpers.oracle import reference_model
from helpers.pair import EAGLE3, PROMPTS
from helpers.recording import recorded_nodes, request_of
from vllm_spechub.engine import grammar

LEVELS = "levels:3,4,3"
IRREGULAR = [0, 0, 0, 1, 1, 2, 4, 4, 4, 4, 6, 11]
WIDE = r"[a-z_. ()\[\]\n]{40}"
SELF_TAG = {
    "structures": [{"begin": "self", "schema": {"enum": ["_cache", "value"]}, "end": ")"}],
    "triggers": ["self"],
}
CONSTRAINTS = [
    {"regex": WIDE},
    {"choice": ["self", "self.value", "raise ValueError(name)"]},
    GRAMMARS["json"],
    {"grammar": 'root ::= ("self." name "(" name ")" [ \\n]+)+\nname ::= [a-z_]+\n'},
    {"structural_tag": json.dumps(SELF_TAG)},
    {"json_object": True},
]


def constrained(constraint, max_tokens=40, **options):
    structured = StructuredOutputsParams(**constraint)
    return greedy_params(max_tokens, structured_outputs=structured, **options)


def mixed():
    """A request with a grammar after every ordinary one. -> (prompts, parameters)"""
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    params = [p for c in CONSTRAINTS for p in (greedy_params(), constrained(c))]
    # goes on after the end of its grammar, where nothing is forbidden any more
    params[3] = constrained(CONSTRAINTS[1], ignore_eos=True)
    return prompts, params


def with_grammars(backend, parser="", **options):
    """Engine settings."""
    config = {"backend": backend, "reasoning_parser": parser, "disable_any_whitespace": True}
    return options | {"structured_outputs_config": config}


def grammar_fallbacks(llm):
    metrics = [m for m in llm.get_metrics() if m.name == "vllm:spechub_fallback_steps"]
    return sum(m.value for m in metrics if m.labels["reason"] == "grammar")


@cache
def plain(backend, parser=""):
    with engine(**with_grammars(backend, parser)) as llm:
        prompts, params = mixed()
        answers = token_ids(llm.generate(prompts, params, use_tqdm=False))
        free = token_ids(llm.generate(PROMPTS, greedy_params(), use_tqdm=False))
    assert answers[::2] == free
    different = sum(a != b for a, b in zip(answers[1::2], free, strict=True))
    assert different >= (3 if parser else len(free))
    return answers


@pytest.mark.parametrize(
    ("backend", "tree", "options"),
    [
        ("xgrammar", "binary:3", {}),
        ("guidance", IRREGULAR, {}),
        ("guidance", "binary:3", {"max_num_batched_tokens": 41, "draft": EAGLE3}),
        ("xgrammar", "caterpillar:5:3", {"block_size": 32, "num_gpu_blocks_override": 14}),
        ("xgrammar", LEVELS, {"max_num_batched_tokens": 41, "num_gpu_blocks_override": 14}),
    ],
)
def test_greedy_tokens(backend, tree, options, monkeypatch):
    expected = plain(backend)
    sizes = []
    fill = grammar.fill_tree_bitmask

    def spy(walk, tree, tokens, bitmask):
        sizes.append(len(tokens))
        fill(walk, tree, tokens, bitmask)

    monkeypatch.setattr(grammar, "fill_tree_bitmask", spy)
    with engine(tree, **with_grammars(backend, **options)) as llm:
        assert token_ids(llm.generate(*mixed(), use_tqdm=False)) == expected
        num_nodes = llm.llm_engine.vllm_config.num_speculative_tokens
        before = spec_metrics(llm)
        prompts, params = mixed()
        answers = token_ids(llm.generate(prompts[1::2], params[1::2], use_tqdm=False))
        after = spec_metrics(llm)
        assert grammar_fallbacks(llm) == 0
    assert answers == expected[1::2]
    drafts, accepted = (
        after[name] - before[name] for name in ("num_drafts", "num_accepted_tokens")
    )
    assert accepted > 0.3 * drafts  # grammars alone
    assert sizes.count(num_nodes) > 40
    if "max_num_batched_tokens" in options:
        assert sum(0 < size < num_nodes for size in sizes) > 10


@pytest.mark.parametrize(("tree", "budget"), [("binary:3", 2048), ("binary:3", 41), (LEVELS, 30)])
def test_asynchronous_scheduling(tree, budget):
    """A request that misses a step meets its masks before the scheduler knows its drafts."""
    expected = plain("xgrammar")
    options = with_grammars("xgrammar", max_num_batched_tokens=budget, async_scheduling=True)
    with engine(tree, **options) as llm:
        core = llm.llm_engine.engine_core.engine_core
        assert type(core.scheduler).__name__ == "AsyncTreeScheduler"
        assert token_ids(llm.generate(*mixed(), use_tqdm=False)) == expected
        fallbacks = grammar_fallbacks(llm)
        metrics = spec_metrics(llm)
    assert metrics["num_accepted_tokens"] > 0.3 * metrics["num_drafts"]
    assert (fallbacks > 0) == (budget < 2048)


@pytest.mark.parametrize("tree", ["binary:3", LEVELS])
def test_rows(tree):
    """Every node's logits, masked, equal those of plain decoding of its path."""
    with recorded_nodes() as nodes, engine(tree, **with_grammars("xgrammar")) as llm:
        params = [constrained(constraint) for constraint in CONSTRAINTS]
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    by_request = {output.request_id: i for i, output in enumerate(outputs)}
    oracles = [Oracle("xgrammar", constraint, stop=()) for constraint in CONSTRAINTS]
    checked = forbidden = 0
    for node in nodes[::5]:
        which = by_request[request_of(node.req_id)]
        output, path = outputs[which], node.path_tokens
        prompt = output.prompt_token_ids
        text = [*prompt, *output.outputs[0].token_ids][: node.root_position + 1]
        emitted = [*text[len(prompt) :], *path]
        firsts = range(len(emitted) - len(path), len(emitted))
        if any(emitted[i] not in allowed(oracles[which](emitted[:i])) for i in firsts):
            forbidden += 1  # no probability: its parent's row is checked
            continue
        expected = reference_model()(input_ids=torch.tensor([[*text, *path]])).logits[0, -1]
        may_follow = allowed(oracles[which](emitted))
        mask = torch.full_like(expected, -torch.inf)
        mask[may_follow] = 0
        torch.testing.assert_close(node.logits, expected + mask, atol=2e-4, rtol=1e-4)
        checked += len(may_follow) < len(expected)
    assert checked > 40
    assert forbidden > 20


@pytest.mark.parametrize(
    ("tree", "verification", "backend"),
    [("binary:2", "ordered", "xgrammar"), ([0, 0, 0, 1, 1, 4], "unordered", "guidance")],
)
def test_prefixes_follow_the_masked_target(tree, verification, backend):
    prompt = TOKENIZER(PROMPTS[4])["input_ids"]
    regex = {"regex": r"[a-z_. ()\[\]]{9}"}
    oracle = Oracle(backend, regex, stop=())

    def masked_distribution(prompt, prefixes, params):
        mask = torch.full((len(prefixes), len(TOKENIZER)), -torch.inf, dtype=torch.double)
        for row, prefix in zip(mask, prefixes, strict=True):
            row[allowed(oracle(prefix))] = 0
        return (next_token(prompt, prefixes, params).log() + mask).softmax(-1)

    unmasked = next_token(prompt, [()], SamplingParams(temperature=1.0))
    assert unmasked[0, allowed(oracle([]))].sum() < 0.6  # much is forbidden
    structured = StructuredOutputsParams(**regex)
    params = SamplingParams(n=SAMPLES // 2, max_tokens=LENGTHS[-1], structured_outputs=structured)
    options = with_grammars(backend, max_num_seqs=128, max_num_batched_tokens=4096)
    with engine(tree, verification=verification, **options) as llm:
        output = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0]
        metrics = spec_metrics(llm)
    assert metrics["num_accepted_tokens"] > 0.1 * SAMPLES
    assert_prefixes_follow(output, prompt, params, masked_distribution)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_reasoning_ends_within_a_tree(asynchronous, monkeypatch):
    """Each request thinks up to some punctuation and then follows its grammar."""
    parser = EndsAtPunctuation.__name__
    expected = plain("xgrammar", parser)
    ends = []  # where among a step's emitted tokens the reasoning ended, and how many there were
    accept = grammar.accept_tokens

    def spy(original, manager, request, token_ids):
        if not request.structured_output_request.reasoning_ended:
            ending = [i for i, token in enumerate(token_ids) if token in EndsAtPunctuation.ends]
            ends.extend((where, len(token_ids)) for where in ending[:1])
        return accept(original, manager, request, token_ids)

    monkeypatch.setattr(grammar, "accept_tokens", spy)
    options = with_grammars("xgrammar", parser, async_scheduling=asynchronous)
    with engine("binary:3", **options) as llm:
        assert token_ids(llm.generate(*mixed(), use_tqdm=False)) == expected
    assert any(where + 1 < count for where, count in ends)
