# SPDX-License-Identifier: Apache-2.0
"""vLLM's sources, read with griffe from a wheel or a folder; nothing is installed or imported.

griffe's own loader reads a whole package, which takes a minute for vLLM. This one only reads the
modules that names lead to, about a hundred of 3000.
"""

import ast
import re
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import griffe

PACKAGE, VERSION_FILE = "vllm", "vllm/_version.py"


def download(version: str, folder: str) -> Path:
    """Download a version's wheel, for any platform that pip finds one for."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "none"]
    command += ["--dest", folder, f"vllm=={version}"]
    subprocess.run(command, check=True)
    return next(Path(folder).glob("vllm-*.whl"))


class VllmSource:
    """One version's sources.

    Args:
        where: a wheel, or the folder that holds the package `vllm`.
    """

    def __init__(self, where: Path) -> None:
        self._read = _reader(where)
        self._module, self._assigned = cache(self._visit), cache(self._names_assigned)

    @property
    def version(self) -> str:
        """The version that the sources say they are."""
        found = re.search(
            r"^__version__ = version = '([\d.]+)", self._read(VERSION_FILE) or "", re.M
        )
        if found is None:
            raise LookupError(f"no version in {VERSION_FILE}")
        return found[1]

    def find(self, path: str) -> griffe.Object | None:
        """Find what a dotted path names, through imports and base classes; None if nothing.

        For a name that vLLM imports from another package, this is the alias.
        """
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            found = self._module(".".join(parts[:end]))
            if found is not None:
                for name in parts[end:]:
                    found = self._member(found, name) if found is not None else None
                return found
        return None

    def bases(self, class_: griffe.Class) -> list[griffe.Class]:
        """The class and its bases in vLLM, nearest first."""
        found = [class_]
        for base in class_.bases:
            path = base if isinstance(base, str) else base.canonical_path
            parent = self.find(path) if path.startswith(f"{PACKAGE}.") else None
            if isinstance(parent, griffe.Class):
                found += [one for one in self.bases(parent) if one not in found]
        return found

    def text_of(self, found: griffe.Object) -> str:
        """The source text of a definition."""
        lines = (self._file(found.module.path)[1] or "").splitlines()
        return textwrap.dedent("\n".join(lines[found.lineno - 1 : found.endlineno]))

    def _member(self, owner: griffe.Object, name: str) -> griffe.Object | None:
        holders = self.bases(owner) if isinstance(owner, griffe.Class) else [owner]
        for holder in holders:
            if name in holder.members:
                member = holder.members[name]
                if member.is_alias and member.target_path.startswith(f"{PACKAGE}."):
                    return self.find(member.target_path)
                return member
        for holder in holders:  # griffe lists what `__init__` assigns, but not what others assign
            if isinstance(holder, griffe.Class) and name in self._assigned(holder):
                return griffe.Attribute(name, parent=holder)
        return None

    def _names_assigned(self, class_: griffe.Class) -> set[str]:
        return {
            node.attr
            for node in ast.walk(ast.parse(self.text_of(class_)))
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        }

    def _file(self, module: str) -> tuple[str, str | None]:
        base = module.replace(".", "/")
        for name in (f"{base}.py", f"{base}/__init__.py"):
            text = self._read(name)
            if text is not None:
                return name, text
        return base, None

    def _visit(self, path: str) -> griffe.Module | None:
        name, text = self._file(path)
        if text is None:
            return None
        parent, _, own = path.rpartition(".")
        above = self._module(parent) if parent else None
        return griffe.visit(own, Path(name), text, parent=above)


def _reader(where: Path) -> Callable[[str], str | None]:
    """A function that reads a file such as "vllm/config/vllm.py"; None if there is no such file."""
    if where.is_dir():
        return lambda name: (where / name).read_text() if (where / name).is_file() else None
    archive = zipfile.ZipFile(where)
    names = set(archive.namelist())
    return lambda name: archive.read(name).decode() if name in names else None
