# SPDX-License-Identifier: Apache-2.0
"""Chooses the platform, and names our classes in a spechub configuration."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import register_backend

from vllm_spechub.config import spechub_config
from vllm_spechub.engine.platform import Platform
from vllm_spechub.integration.platforms import PLATFORMS
from vllm_spechub.integration.refusals import (
    SCHEDULERS,
    Unsupported,
    engine_refusals,
    model_refusals,
    multimodal_refusals,
    pair_refusals,
    raise_first,
)
from vllm_spechub.registry import PROPOSERS
from vllm_spechub.targets.base import MEMBERS, OPTION

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def platform() -> Platform:
    """The platform that this process runs on, as vLLM has detected it.

    Raises:
        Unsupported: trees do not run on it.
    """
    name = current_platform.device_name
    if name not in PLATFORMS:
        raise Unsupported(f"spechub: the platform {name!r} is not supported; use CUDA or the CPU")
    return PLATFORMS[name]


def prepare_engine(vllm_config: "VllmConfig") -> None:
    """Refuse what draft trees cannot do yet, then name our worker, scheduler and attention backend.

    Runs whenever vLLM validates an engine's configuration, before any weights are loaded.

    Raises:
        Unsupported: one line that names the setting and what to use instead.
    """
    ours = platform()
    raise_first(engine_refusals(vllm_config, ours))
    spechub = spechub_config(vllm_config)
    target, draft = vllm_config.model_config, spechub.draft_model_config
    if not PROPOSERS.load(spechub.proposer).needs_model:
        draft = None  # vLLM reads the target a second time
    raise_first(model_refusals(target, ours))
    raise_first(multimodal_refusals(target))
    beside = {
        f"speculative_config[{OPTION!r}][{MEMBERS!r}][{i}]": member.draft_model_config
        for i, member in enumerate(spechub.members)
    }
    if draft is not None:
        beside["speculative_config['model']"] = draft
    for option, model in beside.items():
        raise_first(model_refusals(model, ours))
        raise_first(pair_refusals(target, model, option))
    scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
    scheduler.scheduler_cls = SCHEDULERS[bool(scheduler.async_scheduling)]
    parallel.worker_cls = ours.worker
    if parallel.worker_extension_cls:
        inherit_extension(ours.worker, parallel.worker_extension_cls)
    if ours.names_backend:
        vllm_config.attention_config.backend = ours.backend_entry
    if parallel.distributed_executor_backend == "ray":
        # Imports Ray, which is installed if the executor is Ray's.
        from vllm_spechub.integration.ray_executor import SpecHubRayExecutor

        parallel.distributed_executor_backend = SpecHubRayExecutor


def inherit_extension(worker: str, extension: str) -> None:
    """Let our worker's class have an extension that vLLM has given to the class below.

    vLLM extends a class for good. If it did so for a plain engine of this process, ours inherits
    the methods, and vLLM would refuse to add what it does not find among the direct bases.
    """
    ours, extra = resolve_obj_by_qualname(worker), resolve_obj_by_qualname(extension)
    if issubclass(ours, extra) and extra not in ours.__bases__:
        ours.__bases__ += (extra,)


@contextmanager
def attention_backend(platform: Platform) -> Iterator[None]:
    """Within, attention layers that are built choose our backend, and remember it themselves.

    Afterwards vLLM's registry is as it was. Whatever engine loads next in this process makes its
    own choice.
    """
    entry = platform.backend_entry
    overridden_by = entry.get_path() if entry.is_overridden() else None
    register_backend(entry, platform.attention_backend)
    # an engine before this one in the same process may have chosen vLLM's own
    selector._cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        entry.clear_override()
        if overridden_by is not None:
            register_backend(entry, overridden_by)
        selector._cached_get_attn_backend.cache_clear()
