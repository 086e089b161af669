# SPDX-License-Identifier: Apache-2.0
"""The summary that an engine logs once when it starts."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_spechub.config import SpecHubConfig, spechub_config
from vllm_spechub.integration.memory import (
    kv_cache_share,
    weight_bytes,
)
from vllm_spechub.trees.drawing import describe
from vllm_spechub.trees.schedule import TreeSchedule

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from vllm_spechub.engine.member_pass import MemberPass
    from vllm_spechub.proposers.base import TreeProposer


def summarize(
    vllm_config: "VllmConfig",
    target: torch.nn.Module,
    proposer: "TreeProposer",
    members: Sequence["MemberPass"],
    kv_cache_config: "KVCacheConfig",
    reserved_bytes: int,
) -> str:
    """Describe an engine in a few lines: draft, rule, trees, the memory added, what is off and why.

    Args:
        vllm_config: the engine's configuration.
        target: the target, with which a head shares weights.
        proposer: what drafts its trees, with its weights loaded.
        members: the further members of what is verified.
        kv_cache_config: which layers share the KV cache's blocks.
        reserved_bytes: what is kept free for verification.
    """
    config = spechub_config(vllm_config)
    # A proposer may have no model of its own.
    model = getattr(proposer, "model", None)
    weights = 0
    if model is not None:
        weights = weight_bytes(model, config.draft_model_config.dtype, target)
    sharpened = f", sharpening {config.sharpening:g}" if config.sharpening != 1 else ""
    layers = vllm_config.compilation_config.static_forward_context
    own_layers: set[str] = set(getattr(proposer, "draft_attn_layer_names", ()))
    share = kv_cache_share(
        kv_cache_config,
        own_layers.union(*(member.layer_names for member in members)),
        [name for name in layers if getattr(layers[name], "kv_sharing_target_layer_name", None)],
    )
    sizes = [
        (member.name, weight_bytes(member.model, vllm_config.model_config.dtype))
        for member in members
    ]
    off = switched_off(vllm_config)
    rows = [
        ("draft", f"{config.model} ({config.proposer})" if model else config.proposer),
        ("verification", f"{config.verification}{sharpened}"),
        *_combined(config),
        *_trees(config.schedule),
        ("memory added", f"{weights / 2**20:,.1f} MiB of draft weights"),
        *(("", f"{size / 2**20:,.1f} MiB of {name}'s weights") for name, size in sizes),
        ("", f"{proposer.draft_logits.num_bytes / 2**20:,.1f} MiB for the draft's logits"),
        ("", f"{reserved_bytes / 2**20:,.1f} MiB for the target's logits"),
        ("", f"{share:.0%} of every KV cache block"),
        ("off", "; ".join(off) or "nothing"),
    ]
    lines = [f"  {name:<14}{text}" for name, text in rows]
    return "\n".join(["spechub: lossless speculative decoding with draft trees", *lines])


def _combined(config: SpecHubConfig) -> Iterator[tuple[str, str]]:
    """The row for a combined target, if there is one."""
    target = config.target_distribution
    if target is not None:
        models = ["target", *["draft"] * target.reads_draft, *(m.model for m in target.members)]
        values = [
            f"{name} {' '.join(f'{number:g}' for number in np.atleast_1d(value))}"
            for name, value in target.parameters.items()
        ]
        listed = f"{', '.join(models[:-1])} and {models[-1]}"
        yield "verified", f"{target.type} of {', '.join([listed, *values])}, not the target alone"


def _trees(schedule: TreeSchedule) -> Iterator[tuple[str, str]]:
    """The summary's rows for each range of running requests, with its tree drawn below."""
    for batch in schedule.ranges:
        tree, when = batch.tree, ""
        if len(schedule.ranges) > 1:
            when = f"for {batch} requests: "
        if tree is None:
            yield "tree", f"{when}none"
            continue
        yield "tree", f"{when}{tree}: {tree.num_nodes} nodes, depth {tree.depth}"
        for line in describe(tree).splitlines():
            yield "", line


def switched_off(vllm_config: "VllmConfig") -> list[str]:
    """What a spechub engine does without, and why."""
    off = []
    if not vllm_config.scheduler_config.async_scheduling:
        off.append("asynchronous scheduling (as vLLM decided for this platform or configuration)")
    if vllm_config.model_config.enforce_eager:
        off.append("compilation and CUDA graphs (enforce_eager)")
    return off
