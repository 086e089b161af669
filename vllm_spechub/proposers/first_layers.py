# SPDX-License-Identifier: Apache-2.0
"""The first layers of a model as a model of its own: through its own norm and output matrix.

vLLM's classes run their layers up to `end_layer`, because pipeline parallelism cuts them. A model
may be built so, with no weights and no KV cache for the layers above, or share all its layers with
the whole model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy, deepcopy
from typing import Any

import torch
from vllm.compilation.backends import set_model_tag
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import ModelConfig, VllmConfig, replace, set_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

BUILT: ContextVar[int | None] = ContextVar("BUILT", default=None)
"""While a model is built: how many of its layers. `integration/patches/runner.py` reads it."""
MARK = "spechub_layers"
"""The entry of a configuration that tells the cut model from the whole one."""


def check_cut(option: str, layers: Any, model: ModelConfig, least_left: int) -> None:
    """Check that vLLM can cut a model after some of its layers.

    Args:
        option: the key of `--speculative-config`, for the message.
        layers: its value.
        model: of which the layers are.
        least_left: how many layers must be left above the cut.

    Raises:
        ValueError: one line that names the option and what is needed.
    """
    most = model.get_total_num_hidden_layers() - least_left
    where = f"speculative_config[{option!r}]"
    or_auto = "" if least_left else ", or 'auto'"
    if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= most:
        raise ValueError(
            f"{where} is {layers!r}, allowed: a whole number from 1 to {most}{or_auto}, as "
            f"{model.model!r} has {most + least_left} layers"
        )
    if model.is_multimodal_model:
        raise ValueError(
            f"{where}: {model.architecture} is multimodal, and only text models are cut; use the "
            "whole of a smaller draft as 'model'"
        )
    cuttable = model.registry.is_pp_supported_model(model.architectures, model)
    if not cuttable or model.using_transformers_backend():
        raise ValueError(
            f"{where}: vLLM cannot cut {model.architecture} after some of its layers; use the "
            "whole of a smaller draft as 'model'"
        )
    if model.is_moe:
        raise ValueError(
            f"{where}: {model.architecture} has experts, and models with experts are not cut; use "
            "the whole of a smaller draft as 'model'"
        )


def marked(model: ModelConfig, layers: int) -> ModelConfig:
    """A configuration that differs in what compiled code is stored under, and in nothing else."""
    cut = copy(model)
    cut.hf_config = deepcopy(model.hf_config)
    setattr(cut.hf_config, MARK, layers)
    return cut


@contextmanager
def built_with(layers: int) -> Iterator[None]:
    """Within, models are built with their first layers only. What is missing is neither loaded nor
    given a KV cache."""
    token = BUILT.set(layers)
    try:
        yield
    finally:
        BUILT.reset(token)


def inner_model(model: torch.nn.Module) -> tuple[str, Any]:
    """The part of a model that runs its layers, and where it is among the model's modules.

    Raises:
        ValueError: there is not exactly one part that can be cut.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "end_layer", None), int)
    ]
    if len(found) != 1:
        raise ValueError(
            f"spechub: {type(model).__name__} has {len(found)} parts that can be cut after some of "
            "their layers, instead of one; use the whole of a smaller draft as 'model'"
        )
    return found[0]


def check_built(model: torch.nn.Module, layers: int) -> None:
    """Check that a model was built with so many layers.

    Raises:
        ValueError: it was not.
    """
    _, inner = inner_model(model)
    if inner.end_layer != layers:
        raise ValueError(
            f"spechub: vLLM has built {inner.end_layer} layers of {type(model).__name__} instead "
            f"of {layers}; leave speculative_config['draft_layers'] out"
        )


def shared(model: torch.nn.Module, layers: int, vllm_config: VllmConfig) -> torch.nn.Module:
    """A model of the first layers of another one, with the same modules and weights.

    It is compiled if the other one is, under a configuration of its own, because compiled code is
    found by the configuration and the class, which would otherwise be the same.
    """
    name, inner = inner_model(model)
    cut = copy(inner)
    cut.end_layer = layers
    if isinstance(inner, TorchCompileWithNoGuardsWrapper) and not cut.do_not_compile:
        own = replace(vllm_config, model_config=marked(vllm_config.model_config, layers))
        # Both belong to the whole model.
        vars(cut).pop("aot_compiled_fn", None)
        cut.was_aot_compile_fn_loaded_from_disk = False
        with set_current_vllm_config(own), set_model_tag("early_exit"):
            TorchCompileWithNoGuardsWrapper.__init__(cut)
    return _with(model, name.split(".") if name else [], cut)


def _with(model: torch.nn.Module, path: list[str], part: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model in which one part is another, with all other modules shared."""
    if not path:
        return part
    outer = copy(model)
    first, *rest = path
    outer._modules = dict(model._modules)
    outer._modules[first] = _with(getattr(model, first), rest, part)
    return outer


def attention_layers(model: torch.nn.Module, layers: int, vllm_config: VllmConfig) -> set[str]:
    """The names of the attention layers among a model's first layers."""
    _, inner = inner_model(model)
    (blocks,) = (
        child
        for child in inner.children()
        if isinstance(child, torch.nn.ModuleList) and len(child) >= inner.end_layer
    )
    modules = {module for block in blocks[:layers] for module in block.modules()}
    everything = vllm_config.compilation_config.static_forward_context
    return {
        name
        for name, layer in everything.items()
        if isinstance(layer, AttentionLayerBase) and layer in modules
    }
