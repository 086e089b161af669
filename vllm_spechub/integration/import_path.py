# SPDX-License-Identifier: Apache-2.0
"""Leaves the name `triton_kernels` to OpenAI's package.

vLLM probes for that package to choose its MXFP4 kernels. The repository's own folder of that name,
which is `vllm_spechub.triton_kernels`, would be found in its place by whatever runs from the
repository's root.
"""

import os
import sys
from functools import partial
from importlib.machinery import FileFinder, ModuleSpec
from pathlib import Path
from types import ModuleType

NAME = "triton_kernels"
OURS = (Path(__file__).parents[1] / NAME).resolve()


def leave_triton_kernels_to_others() -> None:
    """Make imports pass over our folder as a top-level module, from any folder; once."""
    if _path_hook in sys.path_hooks:
        return
    sys.path_hooks.insert(0, _path_hook)
    for entry in filter(_has_our_folder, tuple(sys.path_importer_cache)):
        del sys.path_importer_cache[entry]


def _has_our_folder(entry: str) -> bool:
    return os.path.realpath(os.path.join(entry, NAME)) == str(OURS)


def _path_hook(entry: str) -> FileFinder:
    """Python's own finder for a folder of `sys.path`, which does not see ours in it.

    Raises:
        ImportError: another folder, which is for Python's own hooks.
    """
    if not _has_our_folder(entry):
        raise ImportError(f"{entry} does not hold {OURS}")
    for hook in sys.path_hooks:
        if hook is not _path_hook:
            try:
                finder = hook(entry)
            except ImportError:
                continue
            if isinstance(finder, FileFinder):
                finder.find_spec = partial(_find_spec, finder)
                return finder
    raise ImportError(f"no finder for {entry}")


def _find_spec(
    finder: FileFinder, fullname: str, target: ModuleType | None = None
) -> ModuleSpec | None:
    return None if fullname == NAME else type(finder).find_spec(finder, fullname, target)
