# SPDX-License-Identifier: Apache-2.0
"""How vLLM's sampling parameters change one row of logits, written from their definitions.

It takes one row and one history in plain torch, and nothing of the engine's layout, kernels or
state. With the target in transformers it also decides whether plain decoding could have given an
answer.
"""

from copy import deepcopy
from functools import cache

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.tokenizers import get_tokenizer
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from helpers.pair import TARGET

REASONING = {"reasoning_start_str": "import", "reasoning_end_str": "# done"}
"""Markers of reasoning that the demo models do write."""


@cache
def reference_model(model: str = TARGET):
    """Load a model in transformers, fp32, as the oracle for rows and caches."""
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    return loaded.eval().requires_grad_(False)


@cache
def reference_exit(model: str, layers: int):
    """A model's first layers, with its own norm and output matrix, in transformers."""
    cut = deepcopy(reference_model(model))
    inner, name = next(
        (part, name)
        for part in cut.modules()
        for name in ("layers", "h")
        if isinstance(getattr(part, name, None), torch.nn.ModuleList)
    )
    setattr(inner, name, getattr(inner, name)[:layers])
    cut.config.num_hidden_layers = inner.config.num_hidden_layers = layers
    return cut


@cache
def tokenizer():
    return get_tokenizer(TARGET)


def tokens_of(text: str) -> list[int]:
    return tokenizer()(text)["input_ids"]


def resolved(params: SamplingParams) -> SamplingParams:
    """A copy of a request's parameters as the engine makes it, with stop tokens and bad words as
    tokens."""
    params = params.clone()
    params.update_from_generation_config({}, tokenizer().eos_token_id)
    params.update_from_tokenizer(tokenizer())
    return params


def last_match(tokens: list[int], marker: list[int]) -> int:
    """Where a marker begins for the last time, -1 if nowhere."""
    starts = range(len(tokens) - len(marker) + 1)
    return max((i for i in starts if tokens[i : i + len(marker)] == marker), default=-1)


def forced_token(history: list[int], budget: int) -> int | None:
    """The token of the end marker that an exhausted thinking budget forces, or None."""
    start, end = (tokens_of(text) for text in REASONING.values())
    opened = last_match(history, start)
    if opened < 0 or opened <= last_match(history, end):
        return None
    if len(history) - opened - len(start) < budget:
        return None
    done = max(n for n in range(len(end)) if n == 0 or history[-n:] == end[:n])
    return end[done]


def processed_row(
    # [vocab_size]
    logits: torch.Tensor,
    prompt: list[int],
    output: list[int],
    params: SamplingParams,
) -> torch.Tensor:
    """The row from which the token after `output` is drawn. [vocab_size] float32

    `params` must be `resolved`. Greedy rows are not divided by their temperature.
    """
    row = logits.clone().float()
    if params.allowed_token_ids:
        banned = torch.ones_like(row, dtype=torch.bool)
        banned[params.allowed_token_ids] = False
        row[banned] = -torch.inf
    for token, bias in (params.logit_bias or {}).items():
        row[token] += bias
    if len(output) < params.min_tokens:
        row[list(params.all_stop_token_ids)] = -torch.inf

    seen = list({*prompt, *output})
    factor = torch.where(
        row[seen] > 0, 1 / params.repetition_penalty, float(params.repetition_penalty)
    )
    row[seen] = row[seen] * factor
    counts = torch.bincount(torch.tensor(output, dtype=torch.long), minlength=len(row))
    row -= params.frequency_penalty * counts
    row -= params.presence_penalty * (counts > 0)
    for *start, last in params.bad_words_token_ids or []:
        if not start or output[-len(start) :] == start:
            row[last] = -torch.inf
    if params.extra_args:
        row[list(set((prompt + output)[-4:]))] -= params.extra_args["repel"]
    if params.thinking_token_budget is not None:
        forced = forced_token(prompt + output, params.thinking_token_budget)
        if forced is not None:
            row[forced] = 1.0e9

    if params.temperature == 0:
        return row
    row /= params.temperature
    if params.min_p > 0:
        row[row < row.max() + torch.tensor(params.min_p).log()] = -torch.inf
    if params.top_k > 0:
        row[row < row.topk(params.top_k).values[-1]] = -torch.inf
    if params.top_p < 1:
        ranked, order = row.sort()
        gone = ranked.softmax(0).cumsum(0) <= 1 - params.top_p
        gone[-1] = False
        row[order[gone]] = -torch.inf
    return row


def assert_same_row(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that rows are equal up to rounding; one token on the edge of a truncation may differ.

    If any request of a batch uses top-p, vLLM masks tokens whose probability is 0 in float32.
    """
    masked, banned = found == -torch.inf, expected == -torch.inf
    both = ~masked & ~banned
    torch.testing.assert_close(found[both], expected[both], atol=1e-4, rtol=1e-4)
    possible = (found.softmax(0) > 1e-30) | (expected.softmax(0) > 1e-30)
    (differ,) = ((masked != banned) & possible).nonzero(as_tuple=True)
    if len(differ):
        value = torch.maximum(found[differ], expected[differ])
        assert len(differ) == 1, differ
        assert value <= expected[both].min() + 1e-3, differ


def assert_plausible(prompt: list[int], output: list[int], params: SamplingParams) -> None:
    """Assert that plain decoding could have given an answer: every token is the best one (greedy),
    or at least possible."""
    params = resolved(params)
    logits = reference_model()(input_ids=torch.tensor([prompt + output])).logits[0]
    for i, token in enumerate(output):
        row = processed_row(logits[len(prompt) + i - 1], prompt, output[:i], params)
        if params.temperature == 0:
            assert row[token] >= row.max() - 1e-3, (i, token)
        else:
            assert row[token] > -torch.inf, (i, token)


class Repel(LogitsProcessor):
    """Lowers the logits of the last four tokens, for requests that ask for it."""

    def __init__(self, vllm_config, req_states):
        self.state = req_states
        self.strength = np.zeros(req_states.max_num_reqs)

    @classmethod
    def validate_params(cls, sampling_params):
        if (sampling_params.extra_args or {}).get("repel", 0) < 0:
            raise ValueError("repel must not be negative")

    def add_request(self, req_idx, sampling_params):
        self.strength[req_idx] = (sampling_params.extra_args or {}).get("repel", 0)
        return self.strength[req_idx] > 0

    def apply(self, logits, ctx):
        local = ctx.expanded_local_pos.tolist()
        for row, req in enumerate(ctx.expanded_idx_mapping.tolist()):
            if self.strength[req] > 0:
                committed = self.state.all_token_ids.gpu[req, : int(self.state.total_len.gpu[req])]
                drafted = ctx.input_ids[row - local[row] + 1 : row + 1]
                recent = (committed[-4:].tolist() + drafted.tolist())[-4:]
                logits[row, list(set(recent))] -= self.strength[req]
        return logits
