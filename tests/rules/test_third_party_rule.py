# SPDX-License-Identifier: Apache-2.0
"""The rule in `examples/`, in everything that takes a rule but the engine."""

import itertools
import json

import pytest
import torch
from typer.testing import CliRunner

from helpers.pair import PAIR
from helpers.third_party import RULE, installed_examples
from vllm_spechub import TokenTree, acceptance, draft_tree, otm, verify_tree
from vllm_spechub.cli import app
from vllm_spechub.drafts.sources import Sources
from vllm_spechub.measure.tuning import rates
from vllm_spechub.measure.tuning.request import TuningRequest
from vllm_spechub.offline.simulation.drafts import Plan, Variant, draft_plans
from vllm_spechub.offline.simulation.reach import reach
from vllm_spechub.offline.simulation.texts import ModelPair, sample_roots
from vllm_spechub.registry import RULES
from vllm_spechub.rules.base import VerificationRule
from vllm_spechub.rules.kernel_rule import PORTABLE_KERNELS, KernelRule
from vllm_spechub.trees.best_tree import parse_tree
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES

TREE = TokenTree((0, 0, 1, 1, 2))
VOCAB, LENGTH = 3, 3


@pytest.fixture(scope="module")
def rule(tmp_path_factory):
    with installed_examples(tmp_path_factory.mktemp("site")):
        yield RULE


def test_the_rule_is_not_one_of_ours(rule):
    assert RULES.load(rule).__module__ == "own_rule"
    assert issubclass(RULES.load(rule), VerificationRule)


def test_the_registry_and_the_table_name_the_same_rules():
    registry = RULES._builtin
    assert list(registry) == list(BUILTIN_RULES)
    for name, rule in BUILTIN_RULES.items():
        assert rule.name == name
        assert rule.rates_of in BUILTIN_RULES
        built = RULES.load(name)(name, PORTABLE_KERNELS)
        assert isinstance(built, KernelRule)
        assert built.max_children == rule.max_children


def test_the_library_is_lossless_with_it(rule):
    """Sequences of three tokens against their exact distribution, in 5 standard errors."""
    generator = torch.Generator().manual_seed(0)
    # next token by the one before; row VOCAB is for none
    target, draft = torch.rand(2, VOCAB + 1, VOCAB, generator=generator).pow(2)
    target, draft = (table / table.sum(dim=1, keepdim=True) for table in (target, draft))

    def after(table, prefixes):
        return table[torch.nn.functional.pad(prefixes, (1, 0), value=VOCAB)[:, -1]]

    count = 60_000
    drafted = draft_tree(
        TREE, lambda prefixes: after(draft, prefixes), count, rule=rule, generator=generator
    )
    paths = [[node - 1 for node in path[1:]] for path in TREE.paths]
    rows = torch.stack([after(target, drafted.tokens[:, path]) for path in paths], dim=1)
    tokens, num_tokens = verify_tree(drafted, rows, generator=generator)
    assert num_tokens.unique().tolist() == [1, 2, 3]
    for column in range(LENGTH):  # what was not emitted comes from the target
        plain = after(target, tokens[:, :column]).multinomial(1, generator=generator).squeeze(1)
        tokens[:, column] = torch.where(tokens[:, column] < 0, plain, tokens[:, column])
    for sequence in itertools.product(range(VOCAB), repeat=LENGTH):
        prob = 1.0
        for before, token in itertools.pairwise((VOCAB, *sequence)):
            prob *= float(target[before, token])
        found = (tokens == torch.tensor(sequence)).all(dim=1).double().mean().item()
        assert abs(found - prob) < 5 * (prob * (1 - prob) / count) ** 0.5


def test_its_reach_is_estimated(rule):
    """Here it is known: the product of the target's probabilities down to the node."""
    pair = ModelPair.load(str(PAIR / "target"), str(PAIR / "draft"), "cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    prompt = pair.encode("def read(self):", 64)
    roots = sample_roots(pair, prompt, 1.0, 6, 12, 3, generator)
    plan = Plan(Variant(rule), TREE)
    drafted = draft_plans(pair, roots, [plan], 1.0, seed=1)
    found = reach(drafted, plan)
    assert found.shape == (len(roots.text), 6)
    assert (found[:, 0] == 1).all()
    probs = drafted.target_logits[drafted.nodes[plan][:, 0]].softmax(dim=1)
    best = drafted.draft_logits[drafted.nodes[plan][:, 0]].topk(2).indices
    error = (found[:, 1:3] - probs.gather(1, best)).mean(dim=0)
    assert (error.abs() < 5 * (0.25 / 64 / len(roots.text)) ** 0.5).all()


def run(*arguments):
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done


SMALL = ("--prompts", PAIR / "prompts.jsonl", "--limit", 2, "--texts", 2, "--tokens", 8)


def test_the_command_line_takes_it(rule, tmp_path):
    models = (PAIR / "target", PAIR / "draft")
    simulated = run(
        "simulate", *models, *SMALL, "-T", 1, "--nodes", 6, "-d", 3, "-r", rule, "-r", "ordered"
    )
    assert rule in simulated.output
    shape = run("shape", *models, *SMALL, "-r", rule, "--nodes", 5, "--depth", 3)
    assert parse_tree(json.loads(shape.stdout), rule).num_nodes == 5
    explained = run(
        "explain", *models, "--prompt", "def read(self):", "-r", rule, "--tree", "binary:2"
    )
    assert "step 1 emits" in explained.output


def test_tuning_measures_it(rule):
    prompts = PAIR / "prompts.jsonl"
    models = str(PAIR / "target"), str(PAIR / "draft")
    sources = Sources(*models)
    request = TuningRequest(sources, prompts, 1, (rule,), 1.0, (6,), (2,), (1,), 1, 8, 1)
    by_slot, tokens_per_step = rates.measure(request, lambda *_: None)
    assert set(by_slot) == set(tokens_per_step) == {rule}
    assert rates.rates_for_trees(by_slot, rule)[1][0] > 0


def test_closed_forms_know_built_in_rules_only(rule):
    p = torch.tensor([0.5, 0.5])
    for closed_form in (acceptance, otm):
        with pytest.raises(ValueError, match=rf"rule is '{rule}', allowed: .*built-in rules only"):
            closed_form(p, p, 1, rule)
    with pytest.raises(ValueError, match=rf"no acceptance rates for verification '{rule}'"):
        parse_tree("auto", rule)
    with pytest.raises(ValueError, match="sharpening must be 1 with rule"):
        draft_tree(TREE, lambda _: p.expand(2, 2), 2, rule=rule, sharpening=2.0)
