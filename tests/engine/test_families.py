# SPDX-License-Identifier: Apache-2.0
"""Tiny models of many families, each as target and as draft: rows and texts against plain vLLM.

`model_families.FAMILIES` lists them. A few are tried in every run, all with `--all-families`.
"""

import random

import pytest
import torch
import vllm.envs
from model_families import FAMILIES
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from helpers import models
from helpers.engines import engine, greedy_params, model_runner, token_ids
from helpers.metrics import spec_metrics
from helpers.pair import DRAFT, PROMPTS, TARGET
from helpers.recording import Node, recorded_nodes, request_of
from vllm_spechub.integration.memory import weight_bytes
from vllm_spechub.integration.refusals import Unsupported

GREEDY = greedy_params(20, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
pytestmark = pytest.mark.usefixtures("inspected_here")
ROWS = 6
"""How many nodes of each depth are compared."""


def cases(refused: bool) -> list:
    """The families; those that are not always tried are marked."""
    marks = {True: (), False: pytest.mark.all_families}
    chosen = [family for family in FAMILIES if (family.refused is not None) == refused]
    return [
        pytest.param(family, id=family.name, marks=marks[family.always or refused])
        for family in chosen
    ]


@pytest.fixture
def surroundings(monkeypatch):
    """Sets variables that vLLM reads, and may have read before."""

    def set_all(variables: dict[str, str]) -> None:
        vllm.envs.disable_envs_cache()
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    yield set_all
    vllm.envs.disable_envs_cache()


def rows_after(llm, texts: list[list[int]]) -> list[torch.Tensor]:
    """The log-probabilities that an engine gives after each text. [vocab_size] each"""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
    prompts = [{"prompt_token_ids": text} for text in texts]
    rows = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        (entries,) = output.outputs[0].logprobs
        rows.append(torch.tensor([entries[token].logprob for token in range(len(entries))]))
    return rows


def assert_rows(llm, found: list[tuple[Node, torch.Tensor]], texts) -> None:
    """Logits at nodes are those that plain decoding gives after the node's path."""
    paths = [
        [*texts[request_of(node.req_id)][: node.root_position + 1], *node.path_tokens]
        for node, _ in found
    ]
    for (node, logits), expected in zip(found, rows_after(llm, paths), strict=True):
        worst = (logits.log_softmax(-1) - expected).abs().max().item()
        assert worst < 1e-3, (node.path_tokens, worst)


def assert_refused(target: str, draft: str, why: str) -> None:
    """In one line, before weights are loaded."""
    load_general_plugins()
    spec = {"method": "spechub", "model": draft}
    options = {"dtype": "float32", "max_model_len": 256, "speculative_config": spec}
    with pytest.raises((Unsupported, ValueError)) as error:
        EngineArgs(model=target, **options).create_engine_config()
    (line,) = [line for line in str(error.value).splitlines() if why in line]
    assert line.startswith(("spechub: ", "speculative_config")) or "Value error" in line


@pytest.mark.parametrize("family", cases(refused=False))
def test_as_target_and_as_draft(family, tmp_path, surroundings, record_property):
    surroundings(family.environment)
    target, draft = models.pair(family, tmp_path)
    if family.refused_as_draft is not None:
        assert_refused(TARGET, draft, family.refused_as_draft)
        draft = DRAFT
    params = [GREEDY, GREEDY, SAMPLED, SAMPLED]
    with (
        recorded_nodes() as nodes,
        engine("binary:3", model=target, draft=draft, block_size=32) as llm,
    ):
        outputs = llm.generate(PROMPTS[2:], params, use_tqdm=False)
        metrics = spec_metrics(llm)
        runner = model_runner(llm)
        kind = type(runner.model).__name__
        drafting = runner.speculator.model
        assert weight_bytes(drafting, torch.float32) > 100_000
    if draft != DRAFT:
        assert type(drafting).__name__ == kind
        assert metrics["num_accepted_tokens"] > 0.5 * metrics["num_drafts"]
    texts = {o.request_id: [*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs}
    by_depth = [[n for n in nodes if len(n.path_tokens) == depth] for depth in range(4)]
    inner = [[n for n in level if n.draft_logits is not None] for level in by_depth[:3]]
    pick = random.Random(0).sample
    with engine(model=target, max_logprobs=-1) as llm:
        expected = token_ids(llm.generate(PROMPTS[2:4], GREEDY, use_tqdm=False))
        assert len({token for text in expected for token in text}) > 2, "dull texts show little"
        assert token_ids(outputs[:2]) == expected
        assert_rows(llm, [(n, n.logits) for level in by_depth for n in pick(level, ROWS)], texts)
    with engine(model=draft, max_logprobs=-1) as llm:
        assert_rows(llm, [(n, n.draft_logits) for level in inner for n in pick(level, ROWS)], texts)
    record_property("family", (family.name, kind))


@pytest.mark.parametrize("family", cases(refused=True))
@pytest.mark.parametrize("role", ["model", "draft"])
def test_refused(family, role, tmp_path, surroundings):
    surroundings(family.environment)
    models.configured(family, tmp_path)
    folders = {"model": TARGET, "draft": TARGET} | {role: str(tmp_path)}
    assert_refused(folders["model"], folders["draft"], family.refused)
