# SPDX-License-Identifier: Apache-2.0
"""Patches for every process: command line, configuration, request checks."""

import functools
import json
from argparse import ArgumentTypeError
from typing import Any

from vllm_spechub.integration.patch import Patch, PatchMismatch
from vllm_spechub.registry import METHOD

HELP = (
    " Method 'spechub' drafts trees: give the word spechub and --spec-model DRAFT, or JSON such as "
    '{"method": "spechub", "model": "DRAFT", "tree": "binary:3", "verification": "traversal"}.'
)


def parse_speculative_config(text: str) -> dict[str, Any] | None:
    """Parse the value of `--speculative-config`: JSON, or only the name of the method.

    Raises:
        ArgumentTypeError: it is neither.
    """
    if text == METHOD:
        return {"method": METHOD}
    try:
        return None if text in ("", "None") else json.loads(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is neither JSON nor the word {METHOD}") from None


def _add_cli_args(original):
    @functools.wraps(original)
    def add_cli_args(parser):
        parser = original(parser)
        for action in parser._actions:
            if "--speculative-config" in action.option_strings:
                action.type = parse_speculative_config
                action.help = f"{action.help}{HELP}"
            elif "--spec-method" in action.option_strings and action.choices is not None:
                action.choices = [*action.choices, METHOD]
        return parser

    return add_cli_args


def _create_speculative_config(original):
    @functools.wraps(original)
    def create_speculative_config(self, target_model_config, target_parallel_config):
        given = self.speculative_config
        if given == METHOD:
            given = {"method": METHOD}
        if isinstance(given, ServedHead) and self.spec_method == METHOD:
            given = {"model": given["model"]}
        method = given.get("method") if isinstance(given, dict) else None
        if METHOD not in (method, self.spec_method):
            return original(self, target_model_config, target_parallel_config)
        if _mismatch is not None:
            raise _mismatch
        from vllm_spechub.config import create_config

        if given is not None and not isinstance(given, dict):
            raise ValueError(
                f"speculative_config is {given!r}, allowed: {METHOD!r} or an object of options"
            )
        options = {str(key).replace("-", "_"): value for key, value in (given or {}).items()}
        for flag, key, value in (
            ("--spec-method", "method", self.spec_method),
            ("--spec-model", "model", self.spec_model),
            ("--spec-tokens", "num_speculative_tokens", self.spec_tokens),
        ):
            if value is None:
                continue
            if options.get(key) not in (None, value):
                raise ValueError(
                    f"{flag} {value} and speculative_config[{key!r}] = {options[key]!r} disagree; "
                    "give one of them"
                )
            options[key] = value
        return create_config(options, target_model_config, target_parallel_config)

    return create_speculative_config


class ServedHead(dict[str, Any]):
    """What vLLM configures if a head is served by its own name and the user says nothing."""


def _maybe_override_with_speculators(original):
    @functools.wraps(original)
    def maybe_override_with_speculators(model, *args, vllm_speculative_config=None, **kwargs):
        given = vllm_speculative_config
        if given == METHOD:
            given = {"method": METHOD}
        if not isinstance(given, dict) or given.get("method") != METHOD:
            target, tokenizer, found = original(
                model, *args, vllm_speculative_config=given, **kwargs
            )
            if found is not None and given is None:
                found = ServedHead(found)
            return target, tokenizer, found
        target, tokenizer, found = original(model, *args, **kwargs)
        if found is None:
            return target, tokenizer, given
        if given.get("model") not in (None, model):
            raise ValueError(
                f"speculative_config['model'] is {given['model']!r}, but the model to serve, "
                f"{model!r}, is a head itself; serve {target!r}"
            )
        return target, tokenizer, given | {"model": model}

    return maybe_override_with_speculators


def _use_v2_model_runner(original):
    @functools.wraps(original.fget)
    def use_v2_model_runner(self):
        from vllm_spechub.config import is_spechub

        return True if is_spechub(self) else original.fget(self)

    return property(use_v2_model_runner)


def _validate_v2_model_runner(original):
    @functools.wraps(original)
    def _validate_v2_model_runner(self):
        from vllm_spechub.config import is_spechub
        from vllm_spechub.integration.select import prepare_engine

        if is_spechub(self):
            prepare_engine(self)
        else:
            original(self)

    return _validate_v2_model_runner


def _validate_spec_decode(original):
    @functools.wraps(original)
    def _validate_spec_decode(self, speculative_config):
        from vllm_spechub.config import SpecHubConfig

        if not isinstance(speculative_config, SpecHubConfig):
            original(self, speculative_config)

    return _validate_spec_decode


def _process_inputs(original):
    @functools.wraps(original)
    def process_inputs(self, *args, **kwargs):
        from vllm_spechub.config import is_spechub

        request = original(self, *args, **kwargs)
        if is_spechub(self.vllm_config):
            # costly to import, and only needed here
            from vllm_spechub.integration.request_limits import hold_to_limits

            hold_to_limits(request, self.vllm_config)
        return request

    return process_inputs


PATCHES = (
    Patch(
        symbol="vllm.engine.arg_utils:EngineArgs.add_cli_args",
        parameters=("parser",),
        why="`--speculative-config` accepts only JSON, and `--spec-method` has fixed choices.",
        how="Lets `--speculative-config` accept the word `spechub` and says so in its help; adds "
        "`spechub` to the choices of `--spec-method`.",
        upstream="none yet",
        until="vLLM lets plugins register speculative methods",
        replace=_add_cli_args,
    ),
    Patch(
        symbol="vllm.engine.arg_utils:EngineArgs.create_speculative_config",
        parameters=("self", "target_model_config", "target_parallel_config"),
        why="`SpeculativeConfig` accepts only vLLM's own methods and keys.",
        how="Builds a `SpecHubConfig` if the method is spechub; otherwise calls the original.",
        upstream="none yet",
        until="vLLM lets plugins register speculative methods",
        replace=_create_speculative_config,
    ),
    Patch(
        symbol="vllm.engine.arg_utils:maybe_override_with_speculators",
        parameters=(
            "model",
            "tokenizer",
            "trust_remote_code",
            "revision",
            "vllm_speculative_config",
            "hf_token",
            "kwargs",
        ),
        why="If the model to serve is a head in the `speculators` format, vLLM serves the head's "
        "target with its own method for it, whatever method the user asks for.",
        how="If the user asks for spechub, serves the head's target with the user's options and "
        "the head as their `model`; otherwise calls the original.",
        upstream="none yet",
        until="vLLM lets plugins register speculative methods",
        replace=_maybe_override_with_speculators,
    ),
    Patch(
        symbol="vllm.config:VllmConfig.use_v2_model_runner",
        parameters=("self",),
        why="Without Triton, as on the CPU, vLLM chooses its V1 model runner, which lacks the "
        "hooks that trees need.",
        how="Returns true for spechub configurations; otherwise calls the original.",
        upstream="none yet",
        until="vLLM runs the V2 model runner on the CPU by default",
        replace=_use_v2_model_runner,
    ),
    Patch(
        symbol="vllm.config:VllmConfig._validate_v2_model_runner",
        parameters=("self",),
        why="Up to 0.32 it refuses the V2 runner if Triton is missing. It is also the last check "
        "before weights are loaded.",
        how="For spechub configurations, refuses what trees do not support and sets our worker, "
        "scheduler and attention backend; otherwise calls the original.",
        upstream="none yet",
        until="vLLM runs the V2 model runner on the CPU, and has a hook for plugins' checks",
        replace=_validate_v2_model_runner,
    ),
    Patch(
        symbol="vllm.sampling_params:SamplingParams._validate_spec_decode",
        parameters=("self", "speculative_config"),
        why="It refuses min_p and logit_bias with any speculation.",
        how="Accepts them for spechub configurations, whose sampler applies both to every node; "
        "otherwise calls the original.",
        upstream="none yet",
        until="vLLM accepts both with speculation on the V2 runner",
        replace=_validate_spec_decode,
    ),
    Patch(
        symbol="vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        parameters=(
            "self",
            "request_id",
            "prompt",
            "params",
            "supported_tasks",
            "arrival_time",
            "lora_request",
            "tokenization_kwargs",
            "trace_headers",
            "priority",
            "data_parallel_rank",
            "resumable",
            "session_id",
            "kv_hints",
        ),
        why="If a request's numbers or lists do not fit into the V2 runner's buffers, the worker "
        "raises an error that stops the whole engine.",
        how="Calls the original; on a spechub engine, then clamps numbers where that changes "
        "nothing, and rejects a request that does not fit.",
        upstream="none yet",
        until="vLLM checks these sizes when it receives a request",
        replace=_process_inputs,
    ),
)

_mismatch: PatchMismatch | None = None


def refuse_spechub(mismatch: PatchMismatch) -> None:
    """Leave vLLM as it is, except that a spechub configuration raises the mismatch."""
    global _mismatch
    _mismatch = mismatch
    for patch in PATCHES[:3]:
        patch.check()
        patch.apply()
