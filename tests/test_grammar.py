# SPDX-License-Identifier: Apache-2.0
"""A node's mask is what plain vLLM gives a fresh request that has decoded the node's path."""

import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from vllm.engine.arg_utils import EngineArgs
from vllm.parser.engine.adapters import ParserEngineReasoningAdapter
from vllm.parser.engine.parser_engine import ReasoningEnd
from vllm.reasoning import ReasoningParser, ReasoningParserManager
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_spechub.topology import TokenTree

PAIR = Path(__file__).parents[1] / "scripts" / "demo_pair"
TARGET, DRAFT = str(PAIR / "target"), str(PAIR / "draft")
TOKENIZER = AutoTokenizer.from_pretrained(TARGET)
EOS = TOKENIZER.eos_token_id
STOP = 7  # a request's own stop token
PROMPT = TOKENIZER("import os\n")["input_ids"]
NEWLINE = TOKENIZER("\n")["input_ids"][0]
SELF = TOKENIZER("self")["input_ids"][0]

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer"}},
    "required": ["ok", "n"],
}
TAG = {
    "type": "structural_tag",
    "format": {
        "type": "triggered_tags",
        "triggers": ["<f"],
        "tags": [
            {
                "begin": "<f>",
                "content": {"type": "json_schema", "json_schema": SCHEMA},
                "end": "</f>",
            }
        ],
    },
}
LEGACY_TAG = {
    "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}],
    "triggers": ["<f"],
}
GRAMMARS = {
    "json": {"json": SCHEMA},
    "json_object": {"json_object": True},
    "regex": {"regex": r"(ab?c|a\d+)*"},
    "closed regex": {"regex": r"a[bc]{2}"},
    "choice": {"choice": ["self", "self.value", "raise"]},
    "grammar": {"grammar": 'root ::= item ("," item)*\nitem ::= "x" | "yy" | "(" root ")"\n'},
    "structural tag": {"structural_tag": json.dumps(TAG)},
    "legacy structural tag": {"structural_tag": json.dumps(LEGACY_TAG)},
}
CASES = [
    *(("xgrammar", name) for name in GRAMMARS),
    *(("guidance", name) for name in GRAMMARS if name != "structural tag"),
    *(("outlines", name) for name in ("json", "regex", "closed regex", "choice")),
]
TREES = ["binary:3", "kary:4:2", "caterpillar:5:3", (0, 0, 0, 1, 1, 2, 4, 4, 4, 4, 6, 11)]


class EndsAtToken(ReasoningParser):
    """As vLLM's parsers of thinking models: reasoning ends behind one token."""

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        return False

    def is_reasoning_end_streaming(self, input_ids, delta_ids) -> bool:
        return NEWLINE in delta_ids

    extract_content_ids = extract_reasoning = extract_reasoning_streaming = None


class EndsAtTwoTokens(EndsAtToken):
    """Ends behind two tokens in a row, of which the first may have been emitted earlier."""

    def is_reasoning_end_streaming(self, input_ids, delta_ids) -> bool:
        assert input_ids[-len(delta_ids) :] == delta_ids
        return input_ids[-2:] == [NEWLINE, SELF]


class EndsWithContent(ParserEngineReasoningAdapter):
    """Ends behind NEWLINE, or implicitly at SELF, which the grammar then begins with."""

    reasoning_end_token_ids = frozenset({NEWLINE, SELF})

    def __init__(self, tokenizer, *args, **kwargs) -> None:
        ReasoningParser.__init__(self, tokenizer)

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        return False

    def find_reasoning_end(self, token_ids: Sequence[int]) -> ReasoningEnd:
        for offset, token in enumerate(token_ids):
            if token in self.reasoning_end_token_ids:
                return ReasoningEnd(offset, token == SELF)
        return ReasoningEnd(len(token_ids), False)


for parser in (EndsAtToken, EndsAtTwoTokens, EndsWithContent):
    ReasoningParserManager.register_module(parser.__name__, module=parser, force=True)


@cache
def manager(backend, tree=None, parser=""):
    """vLLM's manager, over trees if one is given."""
    spec = {"method": "spechub", "model": DRAFT, "tree": tree} if tree else None
    options = {"backend": backend, "reasoning_parser": parser}
    args = EngineArgs(
        TARGET, max_model_len=128, structured_outputs_config=options, speculative_config=spec
    )
    return StructuredOutputManager(args.create_engine_config())


def new_request(manager, constraint, output=()):
    """A request whose grammar has been fed with `output`, token by token. None if refused."""
    params = SamplingParams(
        structured_outputs=StructuredOutputsParams(**constraint), stop_token_ids=[STOP]
    )
    params.update_from_generation_config({}, EOS)
    config = manager.vllm_config
    params._validate_structured_outputs(
        config.model_config, config.structured_outputs_config, TOKENIZER
    )
    request = Request("r", PROMPT, params, None)
    manager.grammar_init(request)
    request.structured_output_request._grammar.result()
    for token in output:
        request.append_output_token_ids(token)
        if not manager.accept_tokens(request, [token]):
            return None
    return request


def plain_mask(manager, request):
    return manager.grammar_bitmask({"r": request}, ["r"], {})[0].copy()


def allowed(mask):
    """The tokens of a mask. [num_allowed]"""
    bits = torch.from_numpy(mask).unsqueeze(1) >> torch.arange(32) & 1
    return bits.flatten()[: len(TOKENIZER)].nonzero().flatten().tolist()


class Oracle:
    """Plain vLLM's masks by output, None where the grammar refuses that output."""

    def __init__(self, backend, constraint, parser="") -> None:
        self.backend = backend
        self.manager = manager(backend, parser=parser)
        self.constraint = constraint
        self.masks = {}

    def __call__(self, output):
        output = tuple(output)
        if output not in self.masks:
            request = new_request(self.manager, self.constraint, output)
            self.masks[output] = request and plain_mask(self.manager, request)
        return self.masks[output]

    def draw(self, output, rng, extra=()):
        """A next token: mostly one that is allowed, at times one that ends, at times any."""
        kind = rng.random()
        mask = self(output)
        if mask is not None and kind < 0.75:
            tokens = allowed(mask)
            wanted = [t for t in extra if t in tokens]
            if wanted and rng.random() < 0.7:
                return rng.choice(wanted)
            return rng.choice([t for t in tokens if len(TOKENIZER.decode([t])) <= 2] or tokens)
        return rng.choice([EOS, STOP]) if kind < 0.85 else rng.randrange(len(TOKENIZER))


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
    requests, drafts = {"before": request, "r": request}, {"r": tokens}
    masks = over_trees.grammar_bitmask(requests, ["before", "r"], drafts)
    assert len(masks) == 1 + 1 + num_nodes
    counts = [0, 0, 0]
    for node, mask in enumerate(masks[1:]):
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
        counts[2 if (mask == -1).all() else 0] += 1
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
