# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter without the work that it repeats at every call of a device function.

Before a device function runs, the interpreter looks through all of Triton's language for builtins
to replace, which the kernel's own start has replaced already. That is nearly half of its time.
"""

import inspect

import triton.language as tl
from triton.runtime import interpreter

_patch = interpreter._patch_lang


def _patch_unless_patched(fn) -> interpreter._LangPatchScope:
    languages = [
        value
        for value in fn.__globals__.values()
        if inspect.ismodule(value) and value in (tl, tl.core)
    ]
    if languages and not any(tl.core.is_builtin(language.load) for language in languages):
        return interpreter._LangPatchScope()
    return _patch(fn)


def install() -> None:
    interpreter._patch_lang = _patch_unless_patched
