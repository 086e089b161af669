# SPDX-License-Identifier: Apache-2.0
"""Patches for every process: structured outputs with trees."""

import functools

from vllm_spechub.integration.patch import Patch


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
        from vllm_spechub.integration import versions
        from vllm_spechub.integration.messages import ScheduledDrafts

        arguments = (self, requests, structured_output_request_ids, scheduled_spec_decode_tokens)
        if is_spechub(self.vllm_config):
            trees = ScheduledDrafts.checked(scheduled_spec_decode_tokens).trees()
            return grammar.grammar_bitmask(*arguments, trees, versions.current().mask_format)
        return original(*arguments)

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


MANAGER = "vllm.v1.structured_output:StructuredOutputManager"

PATCHES = (
    Patch(
        symbol=f"{MANAGER}.validate_tokens",
        parameters=("self", "request", "spec_tokens"),
        why="It treats drafts as a chain and cuts them off at the first token that the grammar "
        "refuses.",
        how="For spechub configurations, keeps the whole tree: tokens that the grammar refuses get "
        "probability 0.",
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
        why="It fills the masks of a request along one chain.",
        how="For spechub configurations, fills one mask per node in a depth-first walk with "
        "rollback.",
        upstream="none yet",
        until="vLLM verifies trees",
        replace=_grammar_bitmask,
    ),
    Patch(
        symbol=f"{MANAGER}.accept_tokens",
        parameters=("self", "request", "new_token_ids"),
        why="It passes all tokens of a step in one call. If a grammar or the reasoning ends within "
        "these tokens, the state may differ from plain decoding, which passes one token per call.",
        how="For spechub configurations, passes the tokens one by one.",
        upstream="none yet",
        until="vLLM passes tokens one by one",
        replace=_accept_tokens,
    ),
)
