# SPDX-License-Identifier: Apache-2.0
"""Pictures of trees: the trace is a real step, and every form shows it."""

import pytest
import torch
from typer.testing import CliRunner

from helpers.pair import DRAFT, TARGET
from vllm_spechub import TokenTree
from vllm_spechub.cli import app
from vllm_spechub.offline.explain import shown, trace
from vllm_spechub.offline.simulation.texts import ModelPair
from vllm_spechub.trees.level_tree import LevelTree

TREE = TokenTree((0, 0, 0, 1, 1, 2))
PROMPT = "def parse_header(line):\n"


@pytest.fixture(scope="module")
def pair():
    return ModelPair.load(TARGET, DRAFT, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("tree", "rule"), [(TREE, "traversal"), (TREE, "rrs"), (LevelTree((3, 3)), "mixed")], ids=str
)
def test_a_trace_follows_its_own_tree(pair, tree, rule):
    """Paths lead from parent to child, probabilities are the models', the text goes on."""
    prompt = pair.encode(PROMPT, 64)
    steps = trace(pair, prompt, tree, rule, 1.0, 8, seed=3)
    token_id = {shown(pair, token): token for token in range(pair.vocab_size)}

    def prob(model, text, below: list[int], token: int) -> float:
        tokens = torch.cat([text, torch.tensor(below, dtype=text.dtype)])
        with torch.inference_mode():
            return float(model(input_ids=tokens.unsqueeze(0)).logits[0, -1].softmax(-1)[token])

    text, emitted = prompt, []
    for step in steps:
        tree = step.tree
        assert step.root == shown(pair, int(text[-1]))
        for parent, node in zip(step.path, step.path[1:], strict=False):
            assert tree.parents[node - 1] == parent
        assert {n for n, seen in enumerate(step.nodes, start=1) if seen.accepted} == set(
            step.path[1:]
        )
        at_a_leaf = tree.num_children[step.path[-1]] == 0
        stopped = "accepted down to a leaf" if at_a_leaf else f"no child of node {step.path[-1]}"
        assert step.ending.startswith(stopped)
        ids = [int(text[-1]), *(token_id[seen.token] for seen in step.nodes)]
        for node, seen in enumerate(step.nodes, start=1):
            below = [ids[above] for above in tree.paths[node][1:-1]]
            assert seen.draft_prob == pytest.approx(prob(pair.draft, text, below, ids[node]), 1e-4)
            wanted = prob(pair.target, text, below, ids[node])
            assert seen.target_prob == pytest.approx(wanted, 1e-4)
        accepted = [ids[node] for node in step.path[1:]]
        bonus = token_id[step.bonus]
        assert step.bonus_prob == pytest.approx(prob(pair.target, text, accepted, bonus), 1e-4)
        emitted.append(len(accepted) + 1)
        text = torch.cat([text, torch.tensor([*accepted, bonus])])
    assert max(emitted) > 1
    assert len({step.ending.split()[0] for step in steps}) == 2


@pytest.mark.parametrize("form", ["text", "tree.png", "tree.html"])
def test_every_form(form, tmp_path):
    out = [] if form == "text" else ["--out", str(tmp_path / form)]
    arguments = [
        "explain",
        TARGET,
        DRAFT,
        "--prompt",
        PROMPT,
        "--steps",
        "2",
        "--tree",
        "[0, 0, 1]",
    ]
    result = CliRunner().invoke(app, arguments + out)
    assert result.exit_code == 0, result.output
    if form == "text":
        assert "step 2 emits" in result.output
        assert result.output.count("q 0.") + result.output.count("q 1.") == 6
    elif form.endswith("html"):
        assert "step 2 emits" in (tmp_path / form).read_text()
    else:
        assert (tmp_path / form).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--out", "tree.gif"], "--out must end in .png or .html"),
        (["--tree", "oak:3"], "'oak:3' is not a tree, allowed: "),
        (["--steps", "9999"], "the models read 1024"),
    ],
)
def test_refusals(option, message):
    result = CliRunner().invoke(app, ["explain", TARGET, DRAFT, "--prompt", PROMPT, *option])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
