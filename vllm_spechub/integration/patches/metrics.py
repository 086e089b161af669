# SPDX-License-Identifier: Apache-2.0
"""Patches that make vLLM's speculative metrics correct for trees, and add metrics of trees.

vLLM counts one position per drafted token, as in a chain. Of a tree, at most as many tokens as it
has levels can be accepted.
"""

import functools
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

from vllm_spechub.integration.patch import Patch, PatchMismatch
from vllm_spechub.integration.reporting import reporting

PROMETHEUS = "metrics for Prometheus"


@dataclass(frozen=True)
class FieldType(Patch):
    """A replaced type of a dataclass's field, which decides how a message is decoded."""

    def _field(self) -> tuple[Any, str]:
        owner, attribute = self._resolve()
        if attribute not in {field.name for field in fields(owner)}:
            raise AttributeError(f"{owner.__name__} has no field {attribute!r}")
        return owner, attribute

    def check(self) -> None:
        try:
            self._field()
        except (ImportError, AttributeError) as error:
            raise PatchMismatch(f"{self.symbol} is gone ({error})") from error

    def apply(self) -> None:
        owner, attribute = self._field()
        owner.__annotations__[attribute] = self.replace(owner.__annotations__[attribute])


def _tree_config(speculative_config):
    """The configuration if it is spechub's, else None."""
    from vllm_spechub.config import SpecHubConfig

    return speculative_config if isinstance(speculative_config, SpecHubConfig) else None


def _tree_stats(_original):
    from vllm_spechub.integration.tree_metrics import TreeDecodingStats

    return TreeDecodingStats | None


def _prom_init(original):
    @functools.wraps(original)
    def __init__(self, speculative_config, labelnames, per_engine_labelvalues, is_diffusion=False):
        config = _tree_config(speculative_config)
        if config is not None:
            speculative_config = SimpleNamespace(num_speculative_tokens=config.schedule.depth)
        original(self, speculative_config, labelnames, per_engine_labelvalues, is_diffusion)
        self.spechub = None
        if config is not None:
            from vllm_spechub.integration.tree_metrics import TreeMetrics

            with reporting(PROMETHEUS):
                self.spechub = TreeMetrics(
                    config.schedule, labelnames, per_engine_labelvalues, self._counter_cls
                )

    return __init__


def _prom_observe(original):
    @functools.wraps(original)
    def observe(self, spec_decoding_stats, engine_idx=0):
        original(self, spec_decoding_stats, engine_idx)
        if self.spechub is not None:
            with reporting(PROMETHEUS):
                self.spechub.observe(spec_decoding_stats, engine_idx)

    return observe


def _log_observe(original):
    @functools.wraps(original)
    def observe(self, spec_decoding_stats):
        from vllm_spechub.integration.tree_metrics import TreeDecodingStats, TreeLogging

        # Statistics of a chain are decoded as statistics of trees, too, but have no slots.
        if isinstance(spec_decoding_stats, TreeDecodingStats) and (
            spec_decoding_stats.accepted_by_slot
        ):
            if getattr(self, "spechub", None) is None:
                self.spechub = TreeLogging()
            self.spechub.observe(spec_decoding_stats)
            if not spec_decoding_stats.num_drafts:
                return
        original(self, spec_decoding_stats)

    return observe


def _log(original):
    from vllm.v1.spec_decode.metrics import logger

    @functools.wraps(original)
    def log(self, log_fn=logger.info):
        original(self, log_fn)
        if getattr(self, "spechub", None) is not None:
            with reporting("the periodic log line"):
                self.spechub.log(log_fn)

    return log


def _async_output_init(original):
    @functools.wraps(original)
    def __init__(self, model_runner_output, sampler_output, *args, **kwargs):
        from vllm_spechub.engine.sampler import TreeSamplerOutput

        if isinstance(sampler_output, TreeSamplerOutput):
            # Queued before the original records its event, which then covers this copy, too.
            sampler_output.start_copy_to_host()
        original(self, model_runner_output, sampler_output, *args, **kwargs)

    return __init__


def _async_output_get(original):
    @functools.wraps(original)
    def get_output(self):
        from vllm_spechub.engine.sampler import TreeSamplerOutput
        from vllm_spechub.integration.messages import TreeRunnerOutput

        output = original(self)
        if isinstance(self.sampler_output, TreeSamplerOutput):
            paths = self.sampler_output.accepted_paths_on_host.numpy()
            slots = self.sampler_output.accepted_slots_on_host
            output = TreeRunnerOutput(
                **vars(output),
                accepted_paths=paths,
                accepted_slots=None if slots is None else slots.numpy(),
            )
        return output

    return get_output


_DEPTHS = "vLLM's metrics have one position per drafted token; a tree has one per depth."

PATCHES = (
    FieldType(
        symbol="vllm.v1.metrics.stats:SchedulerStats.spec_decoding_stats",
        parameters=(),
        why="The engine process sends its statistics to the frontend as the type declared here.",
        how="Declares the type `TreeDecodingStats`, which adds fields with defaults.",
        upstream="none yet",
        until="vLLM lets speculative methods add statistics",
        replace=_tree_stats,
    ),
    Patch(
        symbol="vllm.v1.spec_decode.metrics:SpecDecodingProm.__init__",
        parameters=(
            "self",
            "speculative_config",
            "labelnames",
            "per_engine_labelvalues",
            "is_diffusion",
        ),
        why=_DEPTHS,
        how="For spechub configurations, creates one position per depth, and adds metrics of "
        "trees.",
        upstream="none yet",
        until="vLLM lets speculative methods add statistics",
        replace=_prom_init,
    ),
    Patch(
        symbol="vllm.v1.spec_decode.metrics:SpecDecodingProm.observe",
        parameters=("self", "spec_decoding_stats", "engine_idx"),
        why="It does not count the additional metrics of trees.",
        how="Calls the original; for spechub configurations, then counts those metrics.",
        upstream="none yet",
        until="vLLM lets speculative methods add statistics",
        replace=_prom_observe,
    ),
    Patch(
        symbol="vllm.v1.spec_decode.metrics:SpecDecodingLogging.observe",
        parameters=("self", "spec_decoding_stats"),
        why="It does not keep the statistics that only trees have.",
        how="Keeps them for the next log line, then calls the original.",
        upstream="none yet",
        until="vLLM lets speculative methods add statistics",
        replace=_log_observe,
    ),
    Patch(
        symbol="vllm.v1.spec_decode.metrics:SpecDecodingLogging.log",
        parameters=("self", "log_fn"),
        why="It does not log the statistics that only trees have.",
        how="Calls the original, then logs a second line for trees.",
        upstream="none yet",
        until="vLLM lets speculative methods add statistics",
        replace=_log,
    ),
)
"""Patches for every process; the frontend needs them."""

WORKER_PATCHES = (
    Patch(
        symbol="vllm.v1.worker.gpu.async_utils:AsyncOutput.__init__",
        parameters=(
            "self",
            "model_runner_output",
            "sampler_output",
            "num_sampled_tokens",
            "main_stream",
            "copy_stream",
            "check_ep_fault",
            "pending_aux_output",
        ),
        why="A worker returns accepted tokens, and these do not tell which nodes were accepted.",
        how="Copies the accepted paths of trees to the host along with the tokens.",
        upstream="none yet",
        until="vLLM's sampler output takes extra tensors",
        replace=_async_output_init,
    ),
    Patch(
        symbol="vllm.v1.worker.gpu.async_utils:AsyncOutput.get_output",
        parameters=("self",),
        why="A worker returns accepted tokens, and these do not tell which nodes were accepted.",
        how="Adds the accepted paths to the runner's output.",
        upstream="none yet",
        until="vLLM's sampler output takes extra tensors",
        replace=_async_output_get,
    ),
)
"""Patches for a worker that serves trees."""
