# SPDX-License-Identifier: Apache-2.0
"""Registries of verification rules, proposers and target distributions by name. A name is known
without importing its class, which is imported when it is loaded."""

from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

METHOD = "spechub"
"""The name of the method in `--speculative-config`."""


class Registry:
    """Maps names to classes given as "module:Class".

    Args:
        kind: what the classes are, for error messages.
        builtin: this package's own classes, by name.
        group: the entry point group in which other packages list theirs.

    Examples::

        # pyproject.toml of another package
        [project.entry-points."vllm_spechub.rules"]
        mine = "my_package.rules:MyRule"
    """

    def __init__(self, kind: str, builtin: dict[str, str], group: str) -> None:
        self._kind = kind
        self._builtin = builtin
        self._group = group

    @cached_property
    def _entries(self) -> dict[str, str]:
        entries = dict(self._builtin)
        for point in entry_points(group=self._group):
            if entries.setdefault(point.name, point.value) != point.value:
                raise ValueError(
                    f"{self._kind} {point.name!r} of {point.value} (entry point group "
                    f"{self._group}) is already {entries[point.name]}; give it another name"
                )
        return entries

    def load(self, name: str) -> type[Any]:
        """Import and return the class with that name.

        Raises:
            ValueError: no class has that name; the message lists the names.
        """
        if name not in self._entries:
            raise ValueError(f"no {self._kind} {name!r}, allowed: {', '.join(self)}")
        module, _, attribute = self._entries[name].partition(":")
        return getattr(import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


RULES = Registry(
    "verification rule",
    {
        "traversal": "vllm_spechub.rules.kernel_rule:KernelRule",
        "mixed": "vllm_spechub.rules.kernel_rule:KernelRule",
        "ordered": "vllm_spechub.rules.kernel_rule:KernelRule",
        "unordered": "vllm_spechub.rules.kernel_rule:KernelRule",
        "rrs": "vllm_spechub.rules.kernel_rule:KernelRule",
        "rrsw": "vllm_spechub.rules.kernel_rule:KernelRule",
        "chain": "vllm_spechub.rules.kernel_rule:KernelRule",
        "match": "vllm_spechub.rules.match_rule:MatchRule",
    },
    "vllm_spechub.rules",
)
PROPOSERS = Registry(
    "proposer",
    {
        "draft_model": "vllm_spechub.proposers.draft_model:DraftModelProposer",
        "early_exit": "vllm_spechub.proposers.early_exit:EarlyExitProposer",
        "eagle": "vllm_spechub.proposers.heads:EagleProposer",
        "eagle3": "vllm_spechub.proposers.heads:Eagle3Proposer",
        "mtp": "vllm_spechub.proposers.heads:MTPProposer",
        "ngram": "vllm_spechub.proposers.ngram:NgramProposer",
    },
    "vllm_spechub.proposers",
)
TARGETS = Registry(
    "target distribution",
    {
        "mixture": "vllm_spechub.targets.builtin:Mixture",
        "logits": "vllm_spechub.targets.builtin:LogitSum",
        "contrastive": "vllm_spechub.targets.builtin:Contrastive",
    },
    "vllm_spechub.targets",
)
