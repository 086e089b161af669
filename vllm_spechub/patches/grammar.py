# SPDX-License-Identifier: Apache-2.0
"""Patches for every process: structured outputs with trees, and what the metrics say of them."""

import functools

from vllm_spechub.patches import Patch

FALLBACK_METRIC = "vllm:spechub_fallback_steps"


def _validate_tokens(original):
    @functools.wraps(original)
    def validate_tokens(self, request, spec_tokens):
        from vllm_spechub.config import is_spechub

        if is_spechub(self.vllm_config):
            return spec_tokens
        return original(self, request, spec_tokens)

    return validate_tokens


def _grammar_bitmask(original):
    @functools.wraps(original)
    def grammar_bitmask(
        self, requests, structured_output_request_ids, scheduled_spec_decode_tokens
    ):
        from vllm_spechub.config import is_spechub
        from vllm_spechub.engine import grammar

        if is_spechub(self.vllm_config):
            fill = grammar.grammar_bitmask
        else:
            fill = original
        return fill(self, requests, structured_output_request_ids, scheduled_spec_decode_tokens)

    return grammar_bitmask


def _accept_tokens(original):
    @functools.wraps(original)
    def accept_tokens(self, request, new_token_ids):
        from vllm_spechub.config import is_spechub
        from vllm_spechub.engine import grammar

        if request.use_structured_output and is_spechub(self.vllm_config):
            return grammar.accept_tokens(original, self, request, new_token_ids)
        return original(self, request, new_token_ids)

    return accept_tokens


def _get_grammar_bitmask(original):
    @functools.wraps(original)
    def get_grammar_bitmask(self, scheduler_output):
        from vllm_spechub.config import is_spechub
        from vllm_spechub.engine import grammar

        output = original(self, scheduler_output)
        if output is not None and is_spechub(self.vllm_config):
            unseen = grammar.unseen_drafts(scheduler_output, output)
            invalid = scheduler_output.num_invalid_spec_tokens or {}
            scheduler_output.num_invalid_spec_tokens = invalid | unseen
        return output

    return get_grammar_bitmask


def _init_spec_decoding_prom(original):
    @functools.wraps(original)
    def __init__(self, speculative_config, labelnames, per_engine_labelvalues, is_diffusion=False):
        from vllm_spechub.config import SpecHubConfig

        original(self, speculative_config, labelnames, per_engine_labelvalues, is_diffusion)
        self.spechub_fallback_steps = {}
        if isinstance(speculative_config, SpecHubConfig):
            counter = self._counter_cls(
                name=FALLBACK_METRIC,
                documentation="Steps of a request in which its draft tree was not used.",
                labelnames=[*labelnames, "reason"],
            )
            self.spechub_fallback_steps = {
                engine: counter.labels(*values, "grammar")
                for engine, values in per_engine_labelvalues.items()
            }

    return __init__


def _observe_spec_decoding(original):
    @functools.wraps(original)
    def observe(self, spec_decoding_stats, engine_idx=0):
        original(self, spec_decoding_stats, engine_idx)
        if engine_idx in self.spechub_fallback_steps:
            # A tree that was not used is counted as a draft of no tokens.
            used = spec_decoding_stats.num_draft_tokens_per_pos[0]
            fallbacks = spec_decoding_stats.num_drafts - used
            self.spechub_fallback_steps[engine_idx].inc(fallbacks)

    return observe


MANAGER = "vllm.v1.structured_output:StructuredOutputManager"
PROMETHEUS = "vllm.v1.spec_decode.metrics:SpecDecodingProm"

PATCHES = (
    Patch(
        symbol=f"{MANAGER}.validate_tokens",
        parameters=("self", "request", "spec_tokens"),
        why="It cuts drafts at the first token that the grammar refuses, taking them for a chain.",
        how="Under spechub leaves a tree whole: what the grammar refuses has no probability.",
        upstream="none yet",
        until="vLLM verifies trees",
        replace=_validate_tokens,
    ),
    Patch(
        symbol=f"{MANAGER}.grammar_bitmask",
        parameters=(
            "self",
            "requests",
            "structured_output_request_ids",
            "scheduled_spec_decode_tokens",
        ),
        why="It fills a request's masks along one chain.",
        how="Under spechub fills one mask per node, by a depth-first walk with rollback.",
        upstream="none yet",
        until="vLLM verifies trees",
        replace=_grammar_bitmask,
    ),
    Patch(
        symbol=f"{MANAGER}.accept_tokens",
        parameters=("self", "request", "new_token_ids"),
        why="It feeds a step's tokens in one call. Grammars and reasoning parsers that end within "
        "them may then end up in another state than after one call each, as in plain decoding.",
        how="Under spechub feeds them one by one.",
        upstream="none yet",
        until="vLLM feeds them so",
        replace=_accept_tokens,
    ),
    Patch(
        symbol="vllm.v1.core.sched.scheduler:Scheduler.get_grammar_bitmask",
        parameters=("self", "scheduler_output"),
        why="With asynchronous scheduling a request that missed a step meets its masks before the "
        "scheduler knows its drafts; its tree goes unused, and vLLM's metrics count it as drafted.",
        how="Under spechub marks such drafts as invalid, which keeps them out of the metrics.",
        upstream="none yet",
        until="the scheduler learns every request's drafts",
        replace=_get_grammar_bitmask,
    ),
    Patch(
        symbol=f"{PROMETHEUS}.__init__",
        parameters=(
            "self",
            "speculative_config",
            "labelnames",
            "per_engine_labelvalues",
            "is_diffusion",
        ),
        why="vLLM has no counter of steps in which a request's tree was not used.",
        how=f"Under spechub adds `{FALLBACK_METRIC}`.",
        upstream="none yet",
        until="vLLM lets plugins add counters",
        replace=_init_spec_decoding_prom,
    ),
    Patch(
        symbol=f"{PROMETHEUS}.observe",
        parameters=("self", "spec_decoding_stats", "engine_idx"),
        why="The same.",
        how="Adds to that counter.",
        upstream="none yet",
        until="vLLM lets plugins add counters",
        replace=_observe_spec_decoding,
    ),
)
