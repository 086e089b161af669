# SPDX-License-Identifier: Apache-2.0
"""Heads in real engines: what is emitted, and how much of what is drafted is accepted."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from vllm import SamplingParams

from helpers import heads
from helpers.distributions import LENGTHS, assert_prefixes_follow
from helpers.engines import engine, greedy_params, model_runner, plain_greedy, token_ids
from helpers.heads import recorded_rows
from helpers.metrics import spec_metrics
from helpers.oracle import tokens_of
from helpers.pair import EAGLE3, PROMPTS
from vllm_spechub.proposers.heads import HeadProposer

ENDS = (0, 2047)
"""The first and the last token of the vocabulary."""


def head_that_drafts_the_ends(folder: Path) -> str:
    """The demo target's head, except that it takes both ends of the vocabulary for two of the most
    frequent tokens, only more so."""
    weights = load_file(Path(EAGLE3) / "model.safetensors")
    ids = torch.arange(len(weights["d2t"])) + weights["d2t"]
    rows = [int((ids == token).nonzero()) for token in (199, 278)]
    common = weights["lm_head.weight"][rows] * 1.2
    ids[[0, -1]] = torch.tensor(ENDS)
    weights["lm_head.weight"][[0, -1]] = common
    weights["d2t"] = ids - torch.arange(len(ids))
    return heads.folder_of(folder, json.loads((Path(EAGLE3) / "config.json").read_text()), weights)


def test_prefixes_follow_the_target(tmp_path, monkeypatch):
    """The head lacks half of the vocabulary, and its hubs are at both ends of it."""
    drafted: list[torch.Tensor] = []
    original = HeadProposer.node_tokens

    def spy(self, step, depth, level, state):
        tokens = original(self, step, depth, level, state)
        if depth > 0:
            drafted.append(tokens)
        return tokens

    monkeypatch.setattr(HeadProposer, "node_tokens", spy)
    prompt, each = tokens_of(PROMPTS[4]), 700
    params = [
        SamplingParams(n=each, max_tokens=LENGTHS[-1], ignore_eos=True, **options)
        for options in ({"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9})
    ]
    options = {"max_num_seqs": 128, "max_num_batched_tokens": 4096}
    head = head_that_drafts_the_ends(tmp_path / "head")
    with engine("kary:3:2", draft=head, verification="traversal", **options) as llm:
        prompts = [{"prompt_token_ids": prompt}] * len(params)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        metrics = spec_metrics(llm)
    tokens = torch.cat(drafted)
    assert min(int((tokens == end).sum()) for end in ENDS) > 0.01 * len(tokens)
    assert metrics["num_accepted_tokens"] > 0.3 * metrics["num_drafts"]
    for output, asked in zip(outputs, params, strict=True):
        assert_prefixes_follow(output, prompt, asked)


def test_a_seed_fixes_the_tokens():
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=30, ignore_eos=True)
    with engine("binary:3", draft=EAGLE3, verification="traversal") as llm:
        first, again = (token_ids(llm.generate(PROMPTS, params, use_tqdm=False)) for _ in range(2))
        alone = token_ids(llm.generate(PROMPTS[2], params, use_tqdm=False))
    assert first == again
    assert alone == first[2:3]


def test_a_mixture_of_experts_drafts_with_its_own_layer(tmp_path):
    model, params = heads.glm4_moe(tmp_path / "glm"), greedy_params(16, ignore_eos=True)
    with engine(model=model) as llm:
        expected = token_ids(llm.generate(PROMPTS[:3], params, use_tqdm=False))
    with recorded_rows() as rows, engine("binary:2", model=model, draft=None) as llm:
        assert token_ids(llm.generate(PROMPTS[:3], params, use_tqdm=False)) == expected
        assert type(model_runner(llm).speculator.model).__name__ == "Glm4MoeMTP"
    oracle = heads.GlmOracle(model)
    assert {len(row.path) for row in rows} == {0, 1}
    for row in rows[:: len(rows) // 20]:
        expected = oracle.row(row.text, row.path)
        torch.testing.assert_close(row.logits, expected, atol=2e-4, rtol=1e-4)


def test_a_chain_is_accepted_as_vllms_own_is():
    """And a tree emits more per step than a chain of the same depth, on the same head."""
    own = {"method": "eagle3", "model": EAGLE3, "num_speculative_tokens": 3}
    params, found = greedy_params(60, ignore_eos=True), {}
    for name, tree, options in (
        ("vLLM", None, {"speculative_config": own}),
        ("chain", "chain:3", {"draft": EAGLE3}),
        ("tree", "binary:3", {"draft": EAGLE3}),
    ):
        with engine(tree, **options) as llm:
            answers = token_ids(llm.generate(PROMPTS, params, use_tqdm=False))
            metrics = spec_metrics(llm)
        assert [answer[:40] for answer in answers] == plain_greedy()
        found[name] = [metrics["num_drafts"], *metrics["num_accepted_tokens_per_pos"][:3]]
    assert found["chain"] == found["vLLM"]
    drafts, *accepted = found["chain"]
    assert sum(accepted) > 0.5 * drafts
    assert sum(found["tree"][1:]) / found["tree"][0] > 1.2 * sum(accepted) / drafts
