# SPDX-License-Identifier: Apache-2.0
"""Whether a head fits its target, by the configurations of both and the head's map of tokens.

The engine and the commands load heads in different ways, and check them here.
"""

from types import SimpleNamespace
from typing import NamedTuple

import torch
from transformers import PretrainedConfig
from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import get_eagle3_aux_layers_from_config

from vllm_spechub.drafts.kinds import EAGLE3

OTHERS = "use a head that was trained for this target, or a model that runs by itself"


class TargetSize(NamedTuple):
    """What a head must know of its target."""

    hidden_size: int
    vocab_size: int
    num_layers: int


def aux_layers(head: PretrainedConfig, num_layers: int) -> tuple[int, ...]:
    """The layers whose outputs an EAGLE-3 head reads; n stands for the state after n layers.

    Args:
        head: its configuration.
        num_layers: of the target, for heads that name none: then it is vLLM's default.
    """
    spec = SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=head))
    named = get_eagle3_aux_layers_from_config(spec)  # type: ignore[arg-type]
    return named or (2, num_layers // 2, num_layers - 3)


def num_aux_layers(head: PretrainedConfig) -> int:
    """How many layers the fusing layer of an EAGLE-3 head joins."""
    options = getattr(head, "eagle_config", None) or {}
    return getattr(head, "num_aux_hidden_states", None) or len(
        options.get("eagle_aux_hidden_state_layer_ids") or range(3)
    )


def fed_size(kind: str, head: PretrainedConfig) -> int:
    """The size of the target's hidden states that a head was made for."""
    own = getattr(head, "target_hidden_size", None) if kind == EAGLE3 else None
    return own or head.hidden_size


def check_fit(option: str, kind: str, head: PretrainedConfig, target: TargetSize) -> None:
    """Check a head's configuration.

    Args:
        option: what named the head, for messages.
        kind: the name of its proposer.
        head: its configuration.
        target: what it is to draft for.

    Raises:
        ValueError: one line that names what differs.
    """
    for what, own, targets in (
        ("hidden states of size", fed_size(kind, head), target.hidden_size),
        ("a vocabulary of size", head.vocab_size, target.vocab_size),
    ):
        if own != targets:
            raise ValueError(
                f"{option}: the head needs a target with {what} {own}, but this one has {targets}; "
                f"{OTHERS}"
            )
    if kind != EAGLE3:
        return
    options = getattr(head, "eagle_config", None) or {}
    if not options.get("use_aux_hidden_state", True):
        raise ValueError(
            f"{option}: the head's eagle_config has use_aux_hidden_state=false, but vLLM feeds "
            f"auxiliary hidden states to every EAGLE-3 head; {OTHERS}"
        )
    deepest, count = target.num_layers, num_aux_layers(head)
    layers = aux_layers(head, deepest)
    if len(set(layers)) != count or not all(0 <= layer <= deepest for layer in layers):
        raise ValueError(
            f"{option}: the head reads {count} of the target's layers, {list(layers)}; allowed: "
            f"{count} different ones from 0 to {deepest}; {OTHERS}"
        )


def check_tokens(
    option: str,
    draft: str,
    # [draft_vocab_size] int64, the target's id less the head's; None if the head has no such map
    offsets: torch.Tensor | None,
    vocab_size: int,
) -> None:
    """Check the map from a head's tokens to its target's, `d2t`.

    Raises:
        ValueError: one line that says what is wrong with it.
    """
    if offsets is None:
        wrong = "is missing"
    else:
        tokens = torch.arange(len(offsets), device=offsets.device) + offsets
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            wrong = f"leaves the target's vocabulary, 0 to {vocab_size - 1}"
        elif len(tokens.unique()) < len(tokens):
            wrong = "names a token of the target twice"
        else:
            return
    raise ValueError(
        f"{option}: d2t in the weights of {draft!r}, which maps the head's tokens to the target's, "
        f"{wrong}; {OTHERS}"
    )
