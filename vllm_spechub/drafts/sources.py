# SPDX-License-Identifier: Apache-2.0
"""Where a target, its tokenizer and a draft come from, by the options of the user's engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OPTIONS = (
    "tokenizer",
    "tokenizer_revision",
    "revision",
    "code_revision",
    "trust_remote_code",
    "hf_overrides",
)
"""The options of an engine that decide it."""


@dataclass(frozen=True)
class Sources:
    """A pair of models as an engine with these options finds it.

    As in vLLM, revisions and overrides are the target's alone, and remote code is trusted of both
    models or of none.
    """

    target: str
    draft: str
    # options of `vllm.LLM`, of which those in `OPTIONS` are read
    engine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokenizer(self) -> str:
        """The folder or Hugging Face id of the tokenizer."""
        return self.engine.get("tokenizer") or self.target

    @property
    def overrides(self) -> dict[str, Any]:
        """What replaces values of the target's configuration."""
        return self.engine.get("hf_overrides") or {}

    @property
    def target_options(self) -> dict[str, Any]:
        """Arguments of transformers' `from_pretrained` for the target."""
        return self._options("revision", "code_revision", "trust_remote_code")

    @property
    def draft_options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` for the draft and its tokenizer."""
        return self._options("trust_remote_code")

    @property
    def tokenizer_options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` for the tokenizer."""
        revision = self.engine.get("tokenizer_revision") or self.engine.get("revision")
        found = self._options("code_revision", "trust_remote_code")
        return found | ({"revision": revision} if revision else {})

    def _options(self, *names: str) -> dict[str, Any]:
        return {name: self.engine[name] for name in names if self.engine.get(name)}
