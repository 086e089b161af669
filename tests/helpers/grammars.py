# SPDX-License-Identifier: Apache-2.0
"""Grammars, reasoning parsers, and plain vLLM's mask after any output, from a new request."""

import json
from collections.abc import Sequence
from functools import cache

import torch
from transformers import AutoTokenizer
from vllm.engine.arg_utils import EngineArgs
from vllm.parser.engine.adapters import ParserEngineReasoningAdapter
from vllm.parser.engine.parser_engine import ReasoningEnd
from vllm.reasoning import ReasoningParser, ReasoningParserManager
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from helpers.pair import DRAFT, TARGET

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


class EndsAtToken(ReasoningParser):
    """Reasoning ends after one token, as in vLLM's parsers of thinking models."""

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        return False

    def is_reasoning_end_streaming(self, input_ids, delta_ids) -> bool:
        return NEWLINE in delta_ids

    extract_content_ids = extract_reasoning = extract_reasoning_streaming = None


class EndsAtPunctuation(EndsAtToken):
    """Reasoning ends after any of a few tokens that the demo models write often."""

    ends = frozenset(TOKENIZER.convert_tokens_to_ids([".", ",", "Ġ-"]))

    def is_reasoning_end_streaming(self, input_ids, delta_ids) -> bool:
        return not self.ends.isdisjoint(delta_ids)


class EndsAtTwoTokens(EndsAtToken):
    """Reasoning ends after two tokens in a row, of which an earlier step may have emitted one."""

    def is_reasoning_end_streaming(self, input_ids, delta_ids) -> bool:
        assert input_ids[-len(delta_ids) :] == delta_ids
        return input_ids[-2:] == [NEWLINE, SELF]


class EndsWithContent(ParserEngineReasoningAdapter):
    """Reasoning ends after NEWLINE, or implicitly before SELF, which belongs to the grammar."""

    reasoning_end_token_ids = frozenset({NEWLINE, SELF})
    # vLLM 0.33 masks it while the model reasons, if the grammar cannot start with it
    implicit_reasoning_end_token_ids = frozenset({SELF})

    def __init__(self, tokenizer, *args, **kwargs) -> None:
        ReasoningParser.__init__(self, tokenizer)

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        return False

    def find_reasoning_end(self, token_ids: Sequence[int]) -> ReasoningEnd:
        for offset, token in enumerate(token_ids):
            if token in self.reasoning_end_token_ids:
                return ReasoningEnd(offset, token == SELF)
        return ReasoningEnd(len(token_ids), False)


for parser in (EndsAtToken, EndsAtPunctuation, EndsAtTwoTokens, EndsWithContent):
    ReasoningParserManager.register_module(parser.__name__, module=parser, force=True)


@cache
def manager(backend, tree=None, parser=""):
    """vLLM's structured output manager, of a spechub engine if a tree is given."""
    spec = {"method": "spechub", "model": DRAFT, "tree": tree} if tree else None
    options = {"backend": backend, "reasoning_parser": parser}
    options["disable_any_whitespace"] = backend != "outlines"  # which does not take it
    args = EngineArgs(
        TARGET, max_model_len=128, structured_outputs_config=options, speculative_config=spec
    )
    return StructuredOutputManager(args.create_engine_config())


def new_request(manager, constraint, output=(), stop=(STOP,)):
    """A request whose grammar has been fed with `output`, token by token. None if refused."""
    params = SamplingParams(
        structured_outputs=StructuredOutputsParams(**constraint), stop_token_ids=[*stop]
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
    """Plain vLLM's mask after an output, None if the grammar refuses that output."""

    def __init__(self, backend, constraint, parser="", stop=(STOP,)) -> None:
        self.backend = backend
        self.manager = manager(backend, parser=parser)
        self.constraint = constraint
        self.stop = stop
        self.masks = {}

    def __call__(self, output):
        output = tuple(output)
        if output not in self.masks:
            request = new_request(self.manager, self.constraint, output, self.stop)
            self.masks[output] = request and plain_mask(self.manager, request)
        return self.masks[output]

    def draw(self, output, rng, extra=()):
        """A random next token: mostly one that is allowed, at times a stop token, at times any."""
        kind = rng.random()
        mask = self(output)
        if mask is not None and kind < 0.75:
            tokens = allowed(mask)
            wanted = [t for t in extra if t in tokens]
            if wanted and rng.random() < 0.7:
                return rng.choice(wanted)
            return rng.choice([t for t in tokens if len(TOKENIZER.decode([t])) <= 2] or tokens)
        return rng.choice([EOS, STOP]) if kind < 0.85 else rng.randrange(len(TOKENIZER))
