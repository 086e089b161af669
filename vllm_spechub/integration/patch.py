# SPDX-License-Identifier: Apache-2.0
"""The patch ledger: every symbol of vLLM that this plugin replaces, and why.

Nothing else in the package assigns to vLLM's names. A patch names its symbol, the parameters it
expects, and the replacement, a function that takes the original and returns what to install.
`docs/patches.md` shows this ledger, and what else the package relies on in vLLM;
`scripts/check_vllm.py` finds that in the package's sources.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from vllm_spechub.integration.versions import MODULES, running, supported


@dataclass(frozen=True)
class Patch:
    """One replaced symbol.

    Attributes:
        symbol: "module:attribute" or "module:Class.attribute".
        parameters: the parameter names that the original must have.
        why: what would go wrong without it.
        how: what the replacement does.
        upstream: the vLLM pull request or issue that would make it unnecessary, or "none yet".
        until: when the patch can go.
        replace: a function from the original to the replacement.
    """

    symbol: str
    parameters: tuple[str, ...]
    why: str
    how: str
    upstream: str
    until: str
    replace: Callable[[Any], Any]

    def _resolve(self) -> tuple[Any, str]:
        module, _, path = self.symbol.partition(":")
        owner: Any = import_module(module)
        *parents, attribute = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        return owner, attribute

    def check(self) -> None:
        """Check that vLLM has the symbol, with the expected parameters.

        Raises:
            PatchMismatch: it is gone, or has other parameters.
        """
        try:
            owner, attribute = self._resolve()
            original = inspect.getattr_static(owner, attribute)
        except (ImportError, AttributeError) as error:
            raise PatchMismatch(f"{self.symbol} is gone ({error})") from error
        original = getattr(original, "__func__", getattr(original, "fget", original))
        found = tuple(inspect.signature(inspect.unwrap(original)).parameters)
        if found != self.parameters:
            raise PatchMismatch(f"{self.symbol} takes {found}, expected {self.parameters}")

    def apply(self) -> None:
        """Install the replacement, unless it is installed already."""
        owner, attribute = self._resolve()
        original = inspect.getattr_static(owner, attribute)
        if getattr(_function(original), "__spechub_patch__", None) == self.symbol:
            return
        kind = type(original) if isinstance(original, staticmethod | classmethod) else None
        replacement = self.replace(original.__func__ if kind else original)
        _function(replacement).__spechub_patch__ = self.symbol
        setattr(owner, attribute, kind(replacement) if kind else replacement)


def _function(value: Any) -> Any:
    """The function inside a property, staticmethod or classmethod."""
    return getattr(value, "fget", None) or getattr(value, "__func__", value)


class PatchMismatch(RuntimeError):
    """The running vLLM is not the one that the patches were written for."""


def apply_all(patches: Iterable[Patch]) -> None:
    """Check vLLM's version and every signature, then install the replacements that are missing.

    Raises:
        PatchMismatch: as `check_all` raises it; nothing is installed then.
    """
    patches = tuple(patches)
    check_all(patches)
    for patch in patches:
        patch.apply()


def check_all(patches: Iterable[Patch]) -> None:
    """Check vLLM's version and every signature.

    Raises:
        PatchMismatch: one line saying what differs and which versions are supported.
    """
    if running() not in MODULES:
        raise PatchMismatch(f"vllm-spechub supports vLLM {supported()}, this is {running()}")
    for patch in patches:
        try:
            patch.check()
        except PatchMismatch as error:
            raise PatchMismatch(
                f"vllm-spechub supports vLLM {supported()}, but in this {running()} {error}"
            ) from error
