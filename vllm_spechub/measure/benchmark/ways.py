# SPDX-License-Identifier: Apache-2.0
"""The ways to decode that are compared, by name and speculative configuration."""

from dataclasses import dataclass
from typing import Any

PLAIN = "plain"


@dataclass(frozen=True)
class Way:
    """A name, and what `speculative_config` gets: None without speculation."""

    name: str
    speculative: dict[str, Any] | None


def chain_config(draft: str, length: int) -> dict[str, Any]:
    """vLLM's own draft-model chain, which needs the draft's probabilities to be lossless."""
    return {
        "method": "draft_model",
        "model": draft,
        "num_speculative_tokens": length,
        "draft_sample_method": "probabilistic",
    }


def plain() -> Way:
    return Way(PLAIN, None)


def chain(draft: str, length: int) -> Way:
    return Way(f"chain {length}", chain_config(draft, length))


def spechub(name: str, draft: str, **options: Any) -> Way:
    return Way(name, {"method": "spechub", "model": draft} | options)


def is_chain(name: str) -> bool:
    """Is a way of this name vLLM's own chain?"""
    return name.startswith("chain ")
