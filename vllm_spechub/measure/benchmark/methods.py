# SPDX-License-Identifier: Apache-2.0
"""The methods to decode that are compared, by name and speculative configuration."""

from dataclasses import dataclass
from typing import Any

PLAIN = "plain"


@dataclass(frozen=True)
class Method:
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


def plain() -> Method:
    return Method(PLAIN, None)


def chain(draft: str, length: int) -> Method:
    return Method(f"chain {length}", chain_config(draft, length))


def spechub(name: str, draft: str, **options: Any) -> Method:
    return Method(name, {"method": "spechub", "model": draft} | options)


def is_chain(name: str) -> bool:
    """Is a method of this name vLLM's own chain?"""
    return name.startswith("chain ")
