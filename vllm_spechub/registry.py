# SPDX-License-Identifier: Apache-2.0
"""Registries of classes by name, resolved on first use so that names cost no imports."""

from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from vllm_spechub.proposers import TreeProposer
    from vllm_spechub.rules.base import VerificationRule

T = TypeVar("T")

METHOD = "spechub"
"""The name of the method in `--speculative-config`."""


class Registry(Generic[T]):
    """Maps names to classes given as "module:Class".

    Examples::

        >>> RULES.register("mine", "my_package.rules:MyRule")   # doctest: +SKIP
        >>> RULES.load("mine")                                  # doctest: +SKIP
    """

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self._kind = kind
        self._entries = dict(entries)

    def register(self, name: str, target: str) -> None:
        """Add a class. Registering the same target twice is harmless.

        Raises:
            ValueError: the name is taken by another class.
        """
        if self._entries.setdefault(name, target) != target:
            raise ValueError(f"{self._kind} {name!r} is already {self._entries[name]}")

    def load(self, name: str) -> type[T]:
        """The class of that name.

        Raises:
            ValueError: no such name.
        """
        if name not in self._entries:
            raise ValueError(f"no {self._kind} {name!r}, allowed: {', '.join(self)}")
        module, _, attribute = self._entries[name].partition(":")
        return getattr(import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


RULES: "Registry[VerificationRule]" = Registry(
    "verification rule",
    {
        "ordered": "vllm_spechub.rules.kernel_rule:OrderedSpecHub",
        "unordered": "vllm_spechub.rules.kernel_rule:UnorderedSpecHub",
        "traversal": "vllm_spechub.rules.kernel_rule:TraversalSpecHub",
        "rrs": "vllm_spechub.rules.kernel_rule:RecursiveRejection",
        "rrsw": "vllm_spechub.rules.kernel_rule:RecursiveRejectionWithoutReplacement",
        "chain": "vllm_spechub.rules.kernel_rule:ChainRejection",
    },
)
PROPOSERS: "Registry[TreeProposer]" = Registry(
    "proposer", {"draft_model": "vllm_spechub.proposers.draft_model:DraftModelProposer"}
)
