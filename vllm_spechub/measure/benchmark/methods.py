# SPDX-License-Identifier: Apache-2.0
"""The decoding methods that are compared: names and speculative configurations."""

from dataclasses import dataclass
from typing import Any

from vllm_spechub.drafts.kinds import MODEL, read_head
from vllm_spechub.drafts.sources import Sources

PLAIN = "plain"


@dataclass(frozen=True)
class Method:
    """A decoding method: its name, and the `speculative_config` of its engine.

    `speculative` is None for plain decoding.
    """

    name: str
    speculative: dict[str, Any] | None


def chain_config(sources: Sources, length: int) -> dict[str, Any]:
    """vLLM's own chain of a draft model or head, which is lossless only with the draft's
    probabilities."""
    return {
        "method": proposer_of(sources),
        "model": sources.draft,
        "num_speculative_tokens": length,
        "draft_sample_method": "probabilistic",
    }


def proposer_of(sources: Sources) -> str:
    """The name of the proposer that drafts with the pair's draft."""
    head = read_head(sources.draft, **sources.draft_options)
    return head.kind if head else MODEL


def plain() -> Method:
    """vLLM without speculation."""
    return Method(PLAIN, None)


def chain(sources: Sources, length: int) -> Method:
    """vLLM's chain of `length` drafted tokens."""
    return Method(f"chain {length}", chain_config(sources, length))


def spechub(name: str, draft: str, **options: Any) -> Method:
    """SpecHub with further options of its `speculative_config`."""
    return Method(name, {"method": "spechub", "model": draft} | options)


def is_chain(name: str) -> bool:
    """Whether the method of this name is one of vLLM's chains."""
    return name.startswith("chain ")
