# SPDX-License-Identifier: Apache-2.0
"""Pictures of trees: the trace is a real step, and every form shows it."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vllm_spechub import TokenTree
from vllm_spechub.cli import app
from vllm_spechub.explain import shown, trace
from vllm_spechub.simulation.texts import ModelPair

PAIR = Path(__file__).parents[1] / "scripts" / "demo_pair"
TARGET, DRAFT = str(PAIR / "target"), str(PAIR / "draft")
PROMPT = "def parse_header(line):\n"


@pytest.fixture(scope="module")
def pair():
    return ModelPair.load(TARGET, DRAFT, "cpu", torch.float32)


@pytest.mark.parametrize("rule", ["traversal", "rrs"])
def test_a_trace_follows_its_own_tree(pair, rule):
    """Paths lead from parent to child, probabilities are the models', the text goes on."""
    tree = TokenTree((0, 0, 0, 1, 1, 2))
    prompt = pair.encode(PROMPT, 64)
    steps = trace(pair, prompt, tree, rule, 1.0, 8, seed=3)
    text, emitted = prompt, []
    for step in steps:
        assert step.root == shown(pair, int(text[-1]))
        for parent, node in zip(step.path, step.path[1:], strict=False):
            assert tree.parents[node - 1] == parent
        assert {n for n, seen in enumerate(step.nodes, start=1) if seen.accepted} == set(
            step.path[1:]
        )
        for model, name in ((pair.target, "target_prob"), (pair.draft, "draft_prob")):
            with torch.inference_mode():
                row = model(input_ids=text.unsqueeze(0)).logits[0, -1].softmax(-1)
            near = [(row - getattr(step.nodes[i], name)).abs().min() for i in range(3)]
            assert max(near) < 1e-5  # the root's children
        spoken = [step.nodes[node - 1].token for node in step.path[1:]] + [step.bonus]
        emitted.append(len(spoken))
        ids = [
            next(t for t in range(pair.vocab_size) if shown(pair, t) == token) for token in spoken
        ]
        text = torch.cat([text, torch.tensor(ids)])
    assert max(emitted) > 1
    assert any("no child" in step.ending for step in steps)


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
        (["--tree", "oak:3"], "'oak:3' is none of"),
        (["--steps", "9999"], "the models read 1024"),
    ],
)
def test_refusals(option, message):
    result = CliRunner().invoke(app, ["explain", TARGET, DRAFT, "--prompt", PROMPT, *option])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
