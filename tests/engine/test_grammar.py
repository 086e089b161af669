# SPDX-License-Identifier: Apache-2.0
"""A node's mask is what plain vLLM gives a fresh request that has decoded the node's path."""

import random

import pytest

from helpers.grammars import (
    GRAMMARS,
    NEWLINE,
    SELF,
    TOKENIZER,
    EndsAtToken,
    EndsAtTwoTokens,
    EndsWithContent,
    Oracle,
    allowed,
    manager,
    new_request,
    plain_mask,
)
from vllm_spechub.integration import versions
from vllm_spechub.integration.messages import ScheduledDrafts
from vllm_spechub.trees.tree import TokenTree

CASES = [
    *(("xgrammar", name) for name in GRAMMARS),
    *(("guidance", name) for name in GRAMMARS if name != "structural tag"),
    *(("outlines", name) for name in ("json", "regex", "closed regex", "choice")),
]
TREES = ["binary:3", "kary:4:2", "caterpillar:5:3", (0, 0, 0, 1, 1, 2, 4, 4, 4, 4, 6, 11)]


def check_tree(oracle, over_trees, tree, output, num_nodes, rng, extra=()):
    """Masks of one random tree below `output`. -> how many nodes were masked, refused, free"""
    request = new_request(over_trees, oracle.constraint, output)
    if request is None:
        return [0, 0, 0]
    tokens = []
    for parent in tree.parents[:num_nodes]:
        above = [tokens[node - 1] for node in tree.paths[parent][1:]]
        siblings = [t for t, p in zip(tokens, tree.parents, strict=False) if p == parent]
        token = oracle.draw([*output, *above], rng, extra)
        while token in siblings:
            token = rng.randrange(len(TOKENIZER))
        tokens.append(token)
    before = plain_mask(over_trees, request)
    requests = {"before": request, "r": request}
    drafts = ScheduledDrafts({"r": tokens}, (tree,), {"before": None, "r": 0})
    masks = over_trees.grammar_bitmask(requests, ["before", "r"], drafts)
    if versions.current().mask_format.fixed_rows:
        own = 1 + tree.num_nodes
        assert len(masks) == 2 * own
    else:
        own = 1
        assert len(masks) == 1 + 1 + num_nodes
    counts = [0, 0, 0]
    for node, mask in enumerate(masks[own:][: 1 + num_nodes]):
        path = [tokens[i - 1] for i in tree.paths[node][1:]]
        above = oracle([*output, *path[:-1]])
        if above is None or (path and path[-1] not in allowed(above)):
            counts[1] += 1  # never reached: its token has no probability
            continue
        expected = oracle([*output, *path])
        if expected is None:  # allowed by a mask, refused when fed: the request fails there
            counts[1] += 1
            continue
        assert (mask == expected).all(), (output, path)
        # where the model reasons, one token may be masked: see `EndsWithContent`
        counts[2 if len(allowed(mask)) >= len(TOKENIZER) - 1 else 0] += 1
    assert (plain_mask(over_trees, request) == before).all()
    assert (before == masks[0]).all()

    # The emitted tokens, a path and one more, leave the grammar where plain decoding would.
    node = rng.randrange(num_nodes + 1)
    emitted = [tokens[i - 1] for i in tree.paths[node][1:]]
    emitted.append(oracle.draw([*output, *emitted], rng, extra))
    request.append_output_token_ids(emitted)
    accepted = over_trees.accept_tokens(request, emitted)
    for i, token in enumerate(emitted):
        if token not in allowed(oracle([*output, *emitted[:i]])):
            return counts  # never emitted
        expected = oracle([*output, *emitted[: i + 1]])
        if expected is None:
            assert not accepted
            return counts
    assert accepted
    assert (plain_mask(over_trees, request) == expected).all()
    return counts


def check_trees(oracle, parser="", opening=(), extra=()):
    """Random trees of every shape. -> how many nodes were masked, refused, free"""
    rng = random.Random(f"{oracle.constraint} {parser}")
    totals = [0, 0, 0]
    for shape in TREES:
        over_trees = manager(oracle.backend, shape, parser)
        tree = TokenTree.parse(shape)
        for _ in range(5):
            output = [*opening[: rng.randrange(len(opening) + 1)]]
            for _ in range(rng.randrange(4)):
                output.append(oracle.draw(output, rng, extra))
                if oracle(output) is None:
                    output.pop()
            num_nodes = rng.choice([tree.num_nodes, rng.randint(1, tree.num_nodes)])
            counts = check_tree(oracle, over_trees, tree, output, num_nodes, rng, extra)
            totals = [a + b for a, b in zip(totals, counts, strict=True)]
    return totals


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_every_node_is_masked_as_its_path(backend, name):
    opening = TOKENIZER('<f>{"ok": true, ')["input_ids"] if "tag" in name else []
    oracle = Oracle(backend, GRAMMARS[name])
    masked, refused, _free = check_trees(oracle, opening=opening, extra=opening[:3])
    assert masked > 30
    assert refused > 20


@pytest.mark.parametrize("parser", [EndsAtToken, EndsAtTwoTokens, EndsWithContent])
@pytest.mark.parametrize(("backend", "name"), [("xgrammar", "choice"), ("guidance", "regex")])
def test_reasoning_that_ends_within_a_tree(backend, name, parser):
    """Below the token that ends it nodes are masked, beside it they are not."""
    oracle = Oracle(backend, GRAMMARS[name], parser.__name__)
    extra = [NEWLINE, SELF]
    masked, refused, free = check_trees(oracle, parser.__name__, extra=extra)
    assert masked > 15
    assert refused > 10
    assert free > 50
