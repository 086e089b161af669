# SPDX-License-Identifier: Apache-2.0
"""Heads without an engine: trees below many roots, the commands, and what is refused.

That single rows are the engine's is tested in `tests/proposers/test_heads.py`.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from helpers import heads
from helpers.heads import Oracle
from helpers.pair import EAGLE3, PAIR, TARGET
from vllm_spechub.cli import app
from vllm_spechub.offline.simulation.drafts import NodeKind, Plan, Variant, draft_plans
from vllm_spechub.offline.simulation.texts import ModelPair, Roots
from vllm_spechub.trees.tree import TokenTree

TREE = TokenTree((0, 0, 0, 1, 1, 2, 4, 4, 6))
PROMPT = "def parse_header(line):\n"


@pytest.fixture(scope="module")
def eagle(tmp_path_factory):
    return heads.eagle1(tmp_path_factory.mktemp("heads") / "eagle")


@pytest.mark.parametrize("kind", ["eagle3", "eagle"])
def test_trees_below_roots(kind, eagle):
    """Every node of trees below roots at several places of two texts."""
    head = EAGLE3 if kind == "eagle3" else eagle
    pair, oracle = ModelPair.load(TARGET, head, "cpu", torch.float32), Oracle(kind, head)
    texts = heads.texts(2, 24)[:, :24]
    roots = Roots(texts, torch.tensor([0, 0, 1, 1]), torch.tensor([1, 13, 9, 23]))
    plan = Plan(Variant("traversal"), TREE)
    drafted = draft_plans(pair, roots, [plan], 1.0, seed=2)
    for root, (text, position) in enumerate(zip(roots.text, roots.position, strict=True)):
        tokens: list[list[int]] = [[] for _ in range(TREE.num_nodes + 1)]
        before = texts[text, : position + 1].tolist()
        for index, node in enumerate(TREE.internal_nodes.tolist()):
            number = drafted.nodes[plan][root, index]
            expected = oracle.row(before, tuple(tokens[node]))
            found = drafted.draft_logits[number]
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
            children = drafted.children[NodeKind(plan.variant, int(TREE.num_children[node]))]
            for slot, token in enumerate(children.tokens[children.rows(number)].tolist()):
                tokens[TREE.first_child[node] + slot] = [*tokens[node], token]


def run(*arguments: str):
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, " ".join(result.output.split())


SMALL = ("--prompts", str(PAIR / "prompts.jsonl"), "--limit", "2", "--texts", "2", "--tokens", "8")


def test_commands(tmp_path):
    code, output = run("explain", TARGET, EAGLE3, "--prompt", PROMPT, "--steps", "2")
    assert code == 0, output
    assert "step 2 emits" in output
    assert output.count("q 0.") + output.count("q 1.") == 2 * 14
    picture = tmp_path / "tree.png"
    code, output = run("explain", TARGET, EAGLE3, "--prompt", PROMPT, "--out", str(picture))
    assert code == 0, output
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, output = run("shape", TARGET, EAGLE3, *SMALL, "-n", "6", "-d", "3")
    assert code == 0, output
    assert TokenTree(tuple(json.loads(output[output.rindex("[") :]))).num_nodes <= 6
    rules = ("-r", "traversal", "-r", "rrs")
    code, output = run("simulate", TARGET, EAGLE3, *SMALL, "-T", "1", "-n", "6", "-d", "2", *rules)
    assert code == 0, output
    assert "tokens per step at T = 1" in output


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ({"target_hidden_size": 96}, {}, "hidden states of size 96, but this one has 192"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}, {}, "3 different ones from 0 to 3"),
        ({}, {"d2t": None}, "which maps the head's tokens to the target's, is missing"),
        ({}, {"fc.weight": None}, "fc.weight in its weights are missing, unknown or of another"),
        ({}, {"extra": torch.ones(2)}, "extra in its weights are missing, unknown or of another"),
        ({}, {"norm.weight": torch.ones(2)}, "norm.weight in its weights are missing, unknown or"),
    ],
)
def test_heads_that_do_not_fit_are_refused(tmp_path, config, weights, message):
    config = json.loads((Path(EAGLE3) / "config.json").read_text()) | config
    kept = load_file(Path(EAGLE3) / "model.safetensors") | weights
    kept = {name: weight for name, weight in kept.items() if weight is not None}
    head = heads.folder_of(tmp_path / "head", config, kept)
    code, output = run("explain", TARGET, head, "--prompt", PROMPT)
    assert code == 2
    assert message in output
    assert output.startswith("error: DRAFT")


def test_what_runs_in_engines_only_is_refused(tmp_path):
    model = heads.mimo(tmp_path / "mimo")
    code, output = run("explain", model, model, "--prompt", PROMPT)
    assert code == 2
    assert "is a head (vLLM reads its configuration as MiMoMTPModel), which runs only in" in output
    code, output = run("explain", TARGET, EAGLE3, "--prompt", "x")
    assert code == 2
    assert "has 1 token, but a head reads the hidden state before its root" in output
