# SPDX-License-Identifier: Apache-2.0
"""What an engine can hold of a request's numbers and lists, checked when the request comes in.

vLLM's V2 runner keeps requests in arrays of fixed types and sizes, and the engine's process
receives no integer above 64 bits. What does not fit would stop the engine, and every request on it.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from operator import index
from typing import Any, NamedTuple

import torch
import vllm.envs as envs
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.worker.gpu.sample import logit_bias as buffers

from vllm_spechub.config import spechub_config
from vllm_spechub.targets.base import PREFIX

INT32, INT64 = torch.iinfo(torch.int32), torch.iinfo(torch.int64)
UINT64_MAX = 2**64 - 1
FLOAT32_MAX = torch.finfo(torch.float32).max

CLAMPED = ("top_k", "thinking_token_budget", "stream_interval")
"""Numbers that change nothing from the vocabulary's or the context's size on."""
CLAMPED_REPETITION = ("max_pattern_size", "min_pattern_size", "min_count")
"""The same of `repetition_detection`."""

TOKEN_LISTS = ("allowed_token_ids", "logprob_token_ids")
"""Token ids, which vLLM holds against the vocabulary, but which need not be integers for it."""


class Number(NamedTuple):
    """An integer that must be held as it is."""

    field: str
    largest: torch.iinfo
    # request -> the integers that the field brings, or None
    values: Callable[[EngineCoreRequest, SamplingParams], tuple[Any, ...] | None]


class List(NamedTuple):
    """A list that must fit into a buffer."""

    field: str
    unit: str
    largest: Callable[[], int]
    items: Callable[[SamplingParams], Collection[Any] | None]


NUMBERS = (
    # several answers to one prompt draw with consecutive seeds
    Number(
        "seed",
        INT64,
        lambda _, p: None if p.seed is None else (p.seed, _integer("seed", p.seed) + p.n - 1),
    ),
    Number("priority", INT64, lambda request, _: (request.priority,)),
    Number(
        "lora_int_id",
        INT32,
        lambda request, _: request.lora_request and (request.lora_request.lora_int_id,),
    ),
)

LISTS = (
    List(
        "allowed_token_ids",
        "tokens",
        lambda: buffers.MAX_NUM_ALLOWED_TOKEN_IDS,
        lambda params: params.allowed_token_ids,
    ),
    List(
        "logit_bias",
        "tokens",
        lambda: buffers.MAX_NUM_LOGIT_BIAS_TOKENS,
        lambda params: params.logit_bias,
    ),
    List(
        "min_tokens",
        "stop tokens",
        lambda: buffers.MAX_NUM_STOP_TOKEN_IDS,
        lambda params: params.all_stop_token_ids if params.min_tokens else None,
    ),
    List(
        "bad_words",
        "tokens",
        lambda: envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS,
        lambda params: [token for word in params.bad_words_token_ids or () for token in word],
    ),
)


def hold_to_limits(request: EngineCoreRequest, vllm_config: VllmConfig) -> None:
    """Clamp what changes nothing beyond what the engine can hold, and refuse the rest.

    Args:
        request: its sampling parameters, which are its own copy, are clamped in place.

    Raises:
        VLLMValidationError: one line that names the field and the largest value.
    """
    params = request.sampling_params
    if params is None:
        return
    model = vllm_config.model_config
    prompt = request.prompt_token_ids or ()
    _check_prompt_logprobs(params, vllm_config)
    _check_prompt(prompt, model.get_vocab_size())
    _check_target(params, vllm_config)
    for field, largest, values in NUMBERS:
        for value in values(request, params) or ():
            _integer(field, value)
            if not largest.min <= value <= largest.max:
                raise _refusal(field, value, f"an integer of {largest.min} to {largest.max}")
    if params.structured_outputs is not None:
        _check_travels("structured_outputs", params.structured_outputs.json)
    for field, unit, largest, items in LISTS:
        size = len(items(params) or ())
        if size > largest():
            raise VLLMValidationError(
                f"{field} with {size} {unit} is not supported with spechub; at most {largest()} "
                "are",
                parameter=field,
            )
    _clamp(params, room=model.max_model_len - len(prompt))


def _check_prompt_logprobs(params: SamplingParams, vllm_config: VllmConfig) -> None:
    """vLLM's LoRA code for the CPU has an adapter for each sampled row, and none for a prompt's."""
    if vllm_config.lora_config is None or not current_platform.is_cpu():
        return
    for field in ("prompt_logprobs", "prompt_logprob_token_ids"):
        if getattr(params, field) is not None:
            raise VLLMValidationError(
                f"{field} is not supported on the CPU with enable_lora: vLLM's LoRA code for the "
                "CPU maps adapters to sampled tokens only, not to a prompt's",
                parameter=field,
            )


def _check_travels(field: str, value: Any) -> None:
    """What is sent to the engine's process holds integers of 64 bits, with or without sign. vLLM
    checks `extra_args` itself."""
    if isinstance(value, int):
        if not INT64.min <= value <= UINT64_MAX:
            raise _refusal(field, value, "integers of 64 bits")
    elif isinstance(value, Mapping):
        _check_travels(field, [*value, *value.values()])
    elif isinstance(value, list | tuple | set):
        try:
            for item in value:
                _check_travels(field, item)
        except RecursionError:
            raise VLLMValidationError(
                f"{field} is nested too deeply to be sent to the engine", parameter=field
            ) from None


def _check_prompt(prompt: Sequence[int], vocab_size: int) -> None:
    """vLLM checks a prompt's token ids only where it has a tokenizer."""
    for token in (min(prompt), max(prompt)) if prompt else ():
        if not 0 <= token < vocab_size:
            raise _refusal("prompt_token_ids", token, f"0 to {vocab_size - 1}")


def _check_target(params: SamplingParams, vllm_config: VllmConfig) -> None:
    """The worker would stop at a bad value, and without a `target_distribution` look at none."""
    target = spechub_config(vllm_config).target_distribution
    try:
        if target is not None:
            target.of_request(params.extra_args)
    except ValueError as error:
        raise VLLMValidationError(f"extra_args: {error}", parameter="extra_args") from None
    for key in params.extra_args or {} if target is None else ():
        if str(key).startswith(PREFIX):
            raise VLLMValidationError(
                f"extra_args: {key} is not supported, as this engine has no "
                "speculative_config['target_distribution']; leave it out",
                parameter="extra_args",
            )


def _clamp(params: SamplingParams, room: int) -> None:
    """
    Args:
        room: the number of tokens that the context holds after the prompt.
    """
    params.max_tokens = min(_integer("max_tokens", params.max_tokens), room)
    params.min_tokens = min(_integer("min_tokens", params.min_tokens), room)
    for field in CLAMPED:
        value = getattr(params, field)
        if value is not None:
            setattr(params, field, min(_integer(field, value), INT32.max))
    if params.repetition_detection is not None:
        sizes = {
            field: min(_integer(field, getattr(params.repetition_detection, field)), INT32.max)
            for field in CLAMPED_REPETITION
        }
        params.repetition_detection = replace(params.repetition_detection, **sizes)
    if params.logit_bias:
        params.logit_bias = {
            _integer("logit_bias", token): _float32("logit_bias", bias)
            for token, bias in params.logit_bias.items()
        }
    for field in TOKEN_LISTS:
        if getattr(params, field):
            setattr(params, field, [_integer(field, token) for token in getattr(params, field)])


def _integer(field: str, value: Any) -> int:
    try:
        return index(value)
    except TypeError:
        raise _refusal(field, value, "an integer") from None


def _float32(field: str, value: Any) -> float:
    """The nearest number of 32 bits; infinities stay what they are."""
    if isinstance(value, float) and math.isinf(value):
        return value
    if not isinstance(value, int | float) or math.isnan(value):
        raise _refusal(field, value, "numbers")
    return float(max(-FLOAT32_MAX, min(value, FLOAT32_MAX)))


def _refusal(field: str, value: Any, allowed: str) -> VLLMValidationError:
    shown = repr(value) if len(repr(value)) < 40 else f"{repr(value)[:36]}..."
    return VLLMValidationError(
        f"{field}={shown} is not supported with spechub, allowed: {allowed}", parameter=field
    )
