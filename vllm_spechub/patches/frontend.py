# SPDX-License-Identifier: Apache-2.0
"""Patches for every process: the command line and the configuration."""

import functools
import json
from typing import Any

from vllm_spechub.patches import Patch, PatchMismatch

METHOD = "spechub"


def parse_speculative_config(text: str) -> dict[str, Any] | None:
    """The value of `--speculative-config`: JSON, or the method's bare name."""
    if text == METHOD:
        return {"method": METHOD}
    return None if text in ("", "None") else json.loads(text)


def _add_cli_args(original):
    @functools.wraps(original)
    def add_cli_args(parser):
        parser = original(parser)
        for action in parser._actions:
            if "--speculative-config" in action.option_strings:
                action.type = parse_speculative_config
            elif "--spec-method" in action.option_strings and action.choices is not None:
                action.choices = [*action.choices, METHOD]
        return parser

    return add_cli_args


def _create_speculative_config(original):
    @functools.wraps(original)
    def create_speculative_config(self, target_model_config, target_parallel_config):
        options = self.speculative_config
        if options == METHOD:
            options = {"method": METHOD}
        method = (options or {}).get("method")
        if METHOD not in (method, self.spec_method):
            return original(self, target_model_config, target_parallel_config)
        if _mismatch is not None:
            raise _mismatch
        from vllm_spechub.config import create_config

        options = {key.replace("-", "_"): value for key, value in (options or {}).items()}
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


def _use_v2_model_runner(original):
    @functools.wraps(original.fget)
    def use_v2_model_runner(self):
        from vllm_spechub.config import is_spechub

        return True if is_spechub(self) else original.fget(self)

    return property(use_v2_model_runner)


def _validate_v2_model_runner(original):
    @functools.wraps(original)
    def _validate_v2_model_runner(self):
        from vllm_spechub.config import is_spechub, prepare_engine

        if is_spechub(self):
            prepare_engine(self)
        else:
            original(self)

    return _validate_v2_model_runner


PATCHES = (
    Patch(
        symbol="vllm.engine.arg_utils:EngineArgs.add_cli_args",
        parameters=("parser",),
        why="`--speculative-config` takes JSON only, and `--spec-method` has fixed choices.",
        how="Lets the one accept the bare word `spechub` and adds it to the other's choices.",
        upstream="none yet",
        until="vLLM lets plugins register speculative methods",
        replace=_add_cli_args,
    ),
    Patch(
        symbol="vllm.engine.arg_utils:EngineArgs.create_speculative_config",
        parameters=("self", "target_model_config", "target_parallel_config"),
        why="`SpeculativeConfig` knows its own methods and keys only.",
        how="Builds a `SpecHubConfig` where the method is spechub; otherwise calls the original.",
        upstream="none yet",
        until="vLLM lets plugins register speculative methods",
        replace=_create_speculative_config,
    ),
    Patch(
        symbol="vllm.config:VllmConfig.use_v2_model_runner",
        parameters=("self",),
        why="Without Triton, as on the CPU, vLLM chooses its old runner, which has no tree hooks.",
        how="True for spechub configurations; otherwise the original.",
        upstream="none yet",
        until="vLLM runs the V2 model runner on the CPU by default",
        replace=_use_v2_model_runner,
    ),
    Patch(
        symbol="vllm.config:VllmConfig._validate_v2_model_runner",
        parameters=("self",),
        why="It refuses the V2 runner without Triton, and is the last check before weights load.",
        how="For spechub configurations refuses what trees cannot do and names our worker and "
        "attention backend; otherwise the original.",
        upstream="none yet",
        until="vLLM runs the V2 model runner on the CPU, and has a hook for plugins' checks",
        replace=_validate_v2_model_runner,
    ),
)

_mismatch: PatchMismatch | None = None


def refuse_spechub(mismatch: PatchMismatch) -> None:
    """Leave vLLM as it is, and answer a spechub configuration with the mismatch."""
    global _mismatch
    _mismatch = mismatch
    for patch in PATCHES[:2]:
        patch.check()
        patch.apply()
