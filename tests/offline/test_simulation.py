# SPDX-License-Identifier: Apache-2.0
"""The simulation on a tiny pair made here: rows, expected lengths and the command line."""

import csv
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from vllm_spechub.cli import app
from vllm_spechub.offline.draft_and_verify import DraftTree, verify_tree
from vllm_spechub.offline.simulation import report, study
from vllm_spechub.offline.simulation.drafts import NodeKind, Plan, Variant, draft_plans
from vllm_spechub.offline.simulation.reach import reach
from vllm_spechub.offline.simulation.study import Difference, Row, Sampling, mean_and_ci, measure
from vllm_spechub.offline.simulation.texts import ModelPair, Roots, read_prompts, sample_roots
from vllm_spechub.offline.simulation.yardstick import Yardstick
from vllm_spechub.rules.grown_trees import static_tree
from vllm_spechub.trees.best_tree import parse_tree
from vllm_spechub.trees.level_tree import LevelTree, width_candidates
from vllm_spechub.trees.measured_schedule import measured_widths
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES

RULES = tuple(BUILTIN_RULES)
# of one sample at most: no verification accepts more of such drafts
OPTIMAL = ("traversal", "ordered", "unordered", "chain", "match")

VOCAB = 40
TREE = TokenTree((0, 0, 0, 1, 1, 2, 4, 4, 6))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target and a draft with random weights, the draft a noisy copy of the target."""
    root = tmp_path_factory.mktemp("pair")
    vocab = {chr(97 + i) if i < 26 else f"<{i}>": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<39>")
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,
        eos_token_id=39,
    )
    torch.manual_seed(0)
    target, draft = LlamaForCausalLM(config), LlamaForCausalLM(config)
    draft.load_state_dict(target.state_dict())
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.08)
    for name, model in (("target", target), ("draft", draft)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    lines = [{"turns": ["a b c d"]}, {"prompt": "q r s"}, {"turns": ["x y", "z"]}]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


@pytest.fixture(scope="module")
def pair(folders):
    return ModelPair.load(str(folders / "target"), str(folders / "draft"), "cpu", torch.float32)


@pytest.fixture(scope="module")
def roots(pair):
    prompt = pair.encode("a b c d", 64)
    generator = torch.Generator().manual_seed(0)
    return sample_roots(pair, prompt, 1.0, 6, 12, 3, generator)


def path_tokens(drafts, plan, root: int) -> list[list[int]]:
    """The drafted tokens on the path to every node of one root's tree."""
    tree, paths = plan.tree, [[] for _ in range(plan.tree.num_nodes + 1)]
    for index, node in enumerate(tree.internal_nodes.tolist()):
        count, first = int(tree.num_children[node]), int(tree.first_child[node])
        children = drafts.children[NodeKind(plan.variant, count)]
        row = children.rows(drafts.nodes[plan][root, index])
        for slot, token in enumerate(children.tokens[row].tolist()):
            paths[first + slot] = [*paths[node], token]
    return paths


def test_roots_lie_on_sampled_tokens_before_the_end(pair, roots):
    assert roots.texts.shape == (6, 16)
    assert len(roots.text) > 6
    for text, position in zip(roots.text.tolist(), roots.position.tolist(), strict=True):
        assert position >= 4
        assert 39 not in roots.texts[text, 4 : position + 1]


def test_rows_are_those_of_a_plain_forward_pass(pair, roots):
    """Every node's rows, of trees that share nodes, against its own sequence alone."""
    plans = [
        Plan(Variant(rule), tree)
        for rule in ("ordered", "rrs")
        for tree in (TREE, TokenTree.complete(2, 2))
    ]
    drafts = draft_plans(pair, roots, plans, 0.7, seed=3)
    for plan in plans:
        for root in (0, 4, len(roots.text) - 1):
            text = roots.texts[roots.text[root], : roots.position[root] + 1].tolist()
            paths = path_tokens(drafts, plan, root)
            for index, node in enumerate(plan.tree.internal_nodes.tolist()):
                ids = torch.tensor([text + paths[node]])
                with torch.inference_mode():
                    target = pair.target(ids).logits[0, -1]
                    draft = pair.draft(ids).logits[0, -1]
                number = drafts.nodes[plan][root, index]
                torch.testing.assert_close(
                    drafts.target_logits[number], target, atol=1e-4, rtol=1e-4
                )
                torch.testing.assert_close(drafts.draft_logits[number], draft, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rule", [*RULES, "traversal@1.5"])
def test_expected_tokens_are_what_verification_emits(pair, roots, rule):
    """The closed form of each drafted tree against the mean of many verifications."""
    variant = Variant.parse(rule)
    plan = Plan(variant, TokenTree.chain(4) if rule == "chain" else TREE)
    drafts = draft_plans(pair, roots, [plan], 1.0, seed=5)
    reached = reach(drafts, plan)
    assert (reached[:, 0] - 1).abs().max() < 1e-5
    nodes, samples = drafts.nodes[plan], 3000
    for root in (0, 3):
        paths = path_tokens(drafts, plan, root)
        sampled = [
            drafts.children[kind].sampled[drafts.children[kind].rows(number)]
            for kind, number in zip(
                (
                    NodeKind(variant, int(plan.tree.num_children[n]))
                    for n in plan.tree.internal_nodes
                ),
                nodes[root],
                strict=True,
            )
        ]
        drafted = DraftTree(
            plan.tree,
            variant.rule,
            variant.sharpening,
            torch.tensor([path[-1] for path in paths[1:]]).expand(samples, -1),
            drafts.draft_logits[nodes[root]].expand(samples, -1, -1),
            torch.stack(sampled).expand(samples, -1),
        )
        # leaves' rows do not bear on the length
        rows = torch.full((plan.tree.num_nodes + 1, VOCAB), 1 / VOCAB)
        rows[plan.tree.internal_nodes] = drafts.target_logits[nodes[root]].softmax(dim=-1)
        generator = torch.Generator().manual_seed(root)
        _, num_tokens = verify_tree(drafted, rows.expand(samples, -1, -1), generator=generator)
        error = num_tokens.double().std().item() / samples**0.5
        assert abs(num_tokens.double().mean() - reached[root].sum()) < 4.5 * error + 1e-6


def test_level_widths_are_simulated_as_the_trees_that_they_become(pair, roots):
    """With common noise each root's tree is drafted and accepted as the static one would be."""
    levels = Plan(Variant("mixed"), LevelTree((2, 3, 2)))
    grown = draft_plans(pair, roots, [levels], 1.0, seed=1).grown[levels]
    static = [Plan(Variant("mixed"), static_tree(grown, row)) for row in range(len(roots.text))]
    assert len(set(static)) > 2
    drafts = draft_plans(pair, roots, [levels, *dict.fromkeys(static)], 1.0, seed=1)
    reached = reach(drafts, levels)
    for row, plan in enumerate(static):
        torch.testing.assert_close(reached[row], reach(drafts, plan)[row], rtol=0, atol=1e-6)


def test_common_noise(pair, roots):
    """A plan's trees do not depend on what is drafted beside them; equal siblings of independent
    draws get noise of their own."""
    alone, beside = Plan(Variant("ordered"), TREE), Plan(Variant("rrs"), TokenTree.complete(3, 3))
    first = draft_plans(pair, roots, [alone], 1.0, seed=1)
    second = draft_plans(pair, roots, [beside, alone], 1.0, seed=1)
    other = draft_plans(pair, roots, [alone], 1.0, seed=2)
    paths = [
        [path_tokens(drafts, alone, root) for root in range(len(roots.text))]
        for drafts in (first, second, other)
    ]
    assert paths[0] == paths[1] != paths[2]
    independent = Plan(Variant("rrs"), TokenTree((0, 0, 0, 0, 1, 2, 3, 4)))
    drafts = draft_plans(pair, roots, [independent], 0.2, seed=1)
    twins = distinct = 0
    for root in range(len(roots.text)):
        below = path_tokens(drafts, independent, root)[5:]
        for a, b in ((a, b) for i, a in enumerate(below) for b in below[:i]):
            twins += a[0] == b[0]
            distinct += a[0] == b[0] and a[1] != b[1]
    assert twins > 10
    assert distinct > 0


def test_greedy_plans_accept_the_best_path(pair, roots):
    plans = [Plan(Variant(rule), TREE) for rule in RULES if rule != "chain"]
    drafts = draft_plans(pair, roots, plans, 0.0, seed=0)
    found = [reach(drafts, plan).sum(dim=1) for plan in plans]
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert found[0].unique().tolist() == found[0].round().unique().tolist()


def test_texts_that_end_at_once_are_refused(pair, monkeypatch):
    plans, prompts = [Plan(Variant("chain"), TokenTree.chain(1))], [pair.encode("a", 4)]
    sampling = Sampling(texts=3, tokens=4)
    assert 0 < len(measure(pair, prompts, plans, 1.0, sampling)[plans[0]].tokens) <= 12
    everything_ends = Roots(torch.zeros(3, 5, dtype=torch.int64), *torch.zeros(2, 0).long())
    monkeypatch.setattr(study, "sample_roots", lambda *_: everything_ends)
    with pytest.raises(ValueError, match="every sampled text ended"):
        measure(pair, prompts, plans, 1.0, sampling)


def test_intervals_respect_prompts():
    values = np.array([1.0, 1.0, 3.0, 3.0] * 50)
    mean, ci = mean_and_ci(values, np.tile([0, 0, 1, 1], 50))
    # two prompts, one apart: t over two means
    assert (mean, ci) == (2.0, pytest.approx(12.706 * 1.0, rel=1e-3))
    _, narrow = mean_and_ci(values, np.arange(200))
    assert narrow < 0.2
    assert np.isnan(mean_and_ci(values, np.zeros(200, dtype=int))[1])


def run(command: str, folders, options: str = ""):
    prompts = folders / "prompts.jsonl"
    line = f"{command} {folders / 'target'} {folders / 'draft'} --prompts {prompts} {options}"
    return CliRunner().invoke(app, line.split())


def test_simulate(folders, tmp_path):
    options = "--texts 4 --tokens 12 -d 2 -d 3 --nodes 6 -T 0.5 -T 1 --small"
    done = run("simulate", folders, f"{options} --out {tmp_path}")
    assert done.exit_code == 0, done.output
    for text in ("tokens per step at T = 0.5", "traversal", "optimum"):
        assert text in done.output
    rows = report.read_csv(Row, tmp_path / report.ROWS_CSV)
    assert len(rows) == 2 * len(RULES) * 3
    record = json.loads((tmp_path / report.STUDY_JSON).read_text())
    assert [row["rule"] for row in record["rows"]] == [row.rule for row in rows]
    assert (tmp_path / report.PLOT).stat().st_size > 5000
    differences = report.read_csv(Difference, tmp_path / report.DIFFERENCES_CSV)
    cell = {(r.temperature, r.rule, r.kind): r.tokens_per_step for r in rows}
    for d in differences:
        apart = cell[d.temperature, d.rule, d.kind] - cell[d.temperature, d.baseline, d.kind]
        assert d.difference == pytest.approx(apart, abs=1e-4)
    for y in report.read_csv(Yardstick, tmp_path / report.YARDSTICK_CSV):
        assert 0 < y.acceptance <= y.optimum + 1e-6
        assert y.rule not in OPTIMAL or y.acceptance == pytest.approx(y.optimum, abs=1e-5)
    for row in rows:
        assert TokenTree(row.tree).num_nodes == row.nodes <= 6
        assert row.kind == "complete" or row.depth <= int(row.kind[-1])
        assert 1 < row.tokens_per_step < row.depth + 1


def test_shape_prints_a_tree(folders, tmp_path):
    options = "--texts 4 --tokens 12 --nodes 9 --depth 4 --rule traversal"
    rates = tmp_path / "rates.json"
    done = run("shape", folders, f"{options} --rates {rates}")
    assert done.exit_code == 0, done.output
    tree = parse_tree(json.loads(done.stdout), "traversal")
    assert (tree.num_nodes, tree.depth <= 4) == (9, True)
    shipped = json.loads(rates.read_text())["rates"]
    assert set(shipped) == set(RULES)
    assert [len(slots) for slots in shipped["rrs"]["1"].values()] == [1, 2, 3, 4]
    # the same tree, whatever else is measured
    assert run("shape", folders, options).stdout == done.stdout
    # rows that cost as much as the first
    costs = " --step-cost 1=1 --step-cost 10=9"
    assert json.loads(run("shape", folders, options + costs).stdout) == [0]


def test_shape_keeps_level_widths(folders, tmp_path, monkeypatch):
    """For `levels:auto`."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    asked = "--texts 2 --tokens 12 --nodes 9 --depth 3 --rule mixed --levels"
    candidates, pick = [], study.pick_tree

    def spy(pair, prompts, variant, trees, *arguments):
        candidates.extend(trees)
        return pick(pair, prompts, variant, trees, *arguments)

    monkeypatch.setattr(study, "pick_tree", spy)
    done = run("shape", folders, asked)
    assert done.exit_code == 0, done.output
    tree = parse_tree(json.loads(done.stdout), "mixed")
    pair = str(folders / "target"), str(folders / "draft"), "mixed"
    assert measured_widths(*pair, 9, 3) == tree
    assert parse_tree("levels:auto:9:3", "mixed", partial(measured_widths, *pair)) == tree
    assert tree in candidates
    assert set(candidates) >= set(width_candidates(9, 3))
    assert all(isinstance(each, LevelTree) for each in candidates)


@pytest.mark.parametrize("padded", ["target", "draft"])
def test_vocabularies_that_differ_by_padding(folders, tmp_path, padded):
    """As in the engine: what one of the two pads is cut off, or never drafted."""
    for name in ("target", "draft"):
        shutil.copytree(folders / name, tmp_path / name)
    model = LlamaForCausalLM.from_pretrained(folders / padded)
    model.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    model.save_pretrained(tmp_path / padded)
    pair = ModelPair.load(str(tmp_path / "target"), str(tmp_path / "draft"), "cpu", torch.float32)
    assert pair.vocab_size == model.config.vocab_size - 8 * (padded == "draft")
    tokens = torch.randint(VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        own = LlamaForCausalLM.from_pretrained(folders / "draft")(tokens).logits
        read = pair.draft(input_ids=tokens).logits
        wanted = pair.target(input_ids=tokens).logits
        torch.testing.assert_close(read[..., :VOCAB], own)
        assert read.shape == wanted.shape
        if padded == "target":
            assert (read[..., VOCAB:] == -torch.inf).all()
            # what the target emits, the draft reads
            assert pair.draft(input_ids=torch.full((1, 3), VOCAB + 7)).logits.isfinite().any()
    roots = sample_roots(
        pair, pair.encode("a b c d", 64), 1.0, 6, 12, 3, torch.Generator().manual_seed(0)
    )
    for rule in RULES:
        tree = parse_tree("chain:3", rule) if rule == "chain" else TREE
        plan = Plan(Variant(rule), tree)
        drafted = draft_plans(pair, roots, [plan], 1.0, seed=1)
        assert reach(drafted, plan).isfinite().all()
        for kind in drafted.children.values():
            assert (kind.tokens < VOCAB).all()
    # and a command to its end
    shutil.copy(folders / "prompts.jsonl", tmp_path)
    done = run("shape", tmp_path, "--texts 2 --tokens 8 --nodes 4")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rule best", "rule is 'best', allowed: traversal"),
        ("--rule rrs@2", "sharpening must be 1 with rule 'rrs'"),
        ("--rule ordered@x", "sharpening is 'x', allowed"),
        ("--nodes 64", "--nodes"),
        ("--tokens 500", "--tokens is 500, allowed: less than 123"),
        ("--dtype int8", "--dtype must be one of"),
    ],
)
def test_usage_errors_take_one_line(folders, arguments, message):
    done = run("simulate", folders, arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_prompts_are_asked_for(folders):
    models = [str(folders / "target"), str(folders / "draft")]
    done = CliRunner().invoke(app, ["simulate", *models])
    assert done.exit_code == 2
    assert "--prompts" in done.output


RECORDS = b'{"prompt": "def f(x):"}\n{"turns": ["class A:", "more"]}\n'
BOTH = ["def f(x):", "class A:"]


@pytest.mark.parametrize(
    ("name", "data", "prompts"),
    [
        ("text.txt", b"one\n\ntwo\n", ["one", "two"]),
        ("crlf.txt", b"one\r\n\r\ntwo", ["one", "two"]),
        ("mark.txt", b"\xef\xbb\xbfone\n", ["one"]),
        ("blank.txt", b" \t\none\n", ["one"]),
        # what `str.splitlines` takes for the end of a line
        (
            "form.txt",
            b"one\x0ctwo\x0b\x1c\x1d\x1e\nthree\n",
            ["one\x0ctwo\x0b\x1c\x1d\x1e", "three"],
        ),
        ("cr.txt", b"one\rtwo\n", ["one\rtwo"]),
        ("separators.txt", "1\x852\u20283\u20294\n".encode(), ["1\x852\u20283\u20294"]),
        ("lines.jsonl", RECORDS, BOTH),
        ("lines.json", RECORDS, BOTH),
        ("lines.NDJSON", RECORDS, BOTH),
        ("crlf.jsonl", RECORDS.replace(b"\n", b"\r\n"), BOTH),
        ("mark.jsonl", b"\xef\xbb\xbf" + RECORDS, BOTH),
        (
            "separators.jsonl",
            '{"prompt": "1\x852\u20283\u20294"}\n\n{"prompt": "\\u2028"}'.encode(),
            ["1\x852\u20283\u20294", "\u2028"],
        ),
        ("pair.jsonl", b'{"prompt": "\\ud83d\\ude00"}', ["\U0001f600"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_prompt_files(tmp_path, name, data, prompts):
    file = tmp_path / name
    file.write_bytes(data)
    assert read_prompts(file) == prompts
    assert read_prompts(file, limit=1) == prompts[:1]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.txt", b"\n", " has no prompts"),
        ("latin.txt", b"one\ncaf\xe9\n", ", line 2: not UTF-8 "),
        ("utf16.txt", "one".encode("utf-16"), ", line 1: not UTF-8 "),
        ("utf16.txt", "one".encode("utf-16-le"), ", line 1: a NUL character"),
        ("question.jsonl", b'{"turns": ["fine"]}\n\n{"question": "?"}\n', ", line 3: no `turns` a"),
        ("latin.jsonl", RECORDS + b'{"prompt": "caf\xe9"}', ", line 3: not UTF-8 "),
        ("array.json", b'[{"prompt": "x"}]', ", line 1: no JSON object; JSON Lines"),
        ("array.json", b'[\n {"prompt": "x"}\n]', ", line 1: no JSON object; JSON Lines"),
        ("object.json", b'{\n "prompt": "x"\n}', ", line 1: no JSON object; JSON Lines"),
        ("text.jsonl", b"def f(x):\n", ", line 1: no JSON object; JSON Lines"),
        ("deep.jsonl", b"[" * 10**5, ", line 1: no JSON object; JSON Lines"),
        ("string.jsonl", b'{"turns": "def f(x):"}', ", line 1: `turns` is not a list of strings"),
        ("none.jsonl", b'{"turns": []}', ", line 1: `turns` is not a list of strings"),
        ("number.jsonl", b'{"turns": ["x", 2]}', ", line 1: `turns` is not a list of strings"),
        ("list.jsonl", b'{"prompt": ["x"]}', ", line 1: `prompt` is not a string"),
        ("blank.jsonl", RECORDS + b'{"prompt": ""}', ", line 3: the prompt is empty"),
        ("blank.jsonl", b'{"turns": ["", "x"]}', ", line 1: the prompt is empty"),
        ("half.jsonl", b'{"prompt": "\\ud83d"}', ", line 1: half of a surrogate pair"),
    ],
)
def test_prompt_files_that_are_refused(tmp_path, name, data, message):
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(ValueError) as refused:
        read_prompts(file)
    assert str(refused.value).startswith(f"{file}{message}")
    assert len(str(refused.value).splitlines()) == 1


def test_csv_round_trip(tmp_path):
    row = Row(0.6, 14, "best, depth <= 4", "ordered@1.5", 13, 4, 2.51234, 0.02, 100, 12, (0, 0, 1))
    report.write_csv([row], tmp_path / "rows.csv")
    assert report.read_csv(Row, tmp_path / "rows.csv") == [row]
    with (tmp_path / "rows.csv").open() as file:
        assert next(csv.reader(file))[-1] == "tree"
