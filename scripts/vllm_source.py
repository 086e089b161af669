# SPDX-License-Identifier: Apache-2.0
"""Checks the patch ledger against a vLLM that is not installed, by reading its source."""

import ast
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from vllm_spechub.integration.patch import Patch

Reader = Callable[[str], str | None]
"""Source text of a file such as "vllm/config/vllm.py", None if there is no such file."""


def reader(where: Path) -> Reader:
    """Reads from a wheel, or from the folder that holds the package `vllm`."""
    if where.is_dir():
        return lambda name: (where / name).read_text() if (where / name).is_file() else None
    archive = zipfile.ZipFile(where)
    names = set(archive.namelist())
    return lambda name: archive.read(name).decode() if name in names else None


def check_source(patches: Iterable[Patch], read: Reader) -> dict[str, str]:
    """What is wrong with each patch's symbol in that source, "" where nothing is."""
    return {patch.symbol: _check(patch, read) for patch in patches}


def _check(patch: Patch, read: Reader) -> str:
    module, _, path = patch.symbol.partition(":")
    found = _find(module, path.split("."), read)
    if found is None:
        return "is gone"
    if isinstance(found, ast.AnnAssign):
        return ""
    if isinstance(found, ast.ClassDef):
        return "is a class"
    arguments = found.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    names += [arguments.vararg.arg] if arguments.vararg else []
    names += [a.arg for a in arguments.kwonlyargs]
    names += [arguments.kwarg.arg] if arguments.kwarg else []
    if tuple(names) != patch.parameters:
        return f"takes {tuple(names)}, expected {patch.parameters}"
    return ""


def _find(module: str, path: list[str], read: Reader, seen: frozenset[str] = frozenset()):
    """The definition of `path` in a module, through re-exports."""
    base = module.replace(".", "/")
    source = read(f"{base}.py") or read(f"{base}/__init__.py")
    if source is None or module in seen:
        return None
    is_package = read(f"{base}.py") is None
    body: list[ast.stmt] = ast.parse(source).body
    node = None
    for depth, name in enumerate(path):
        node = next((n for n in _statements(body) if _defines(n, name)), None)
        if isinstance(node, ast.ImportFrom):
            origin = _absolute(node, module, is_package)
            alias = next(a for a in node.names if (a.asname or a.name) == name)
            return _find(origin, [alias.name, *path[depth + 1 :]], read, seen | {module})
        if node is None:
            return None
        body = getattr(node, "body", [])
    return node


def _statements(body: list[ast.stmt]) -> Iterable[ast.stmt]:
    """Statements of a block, those under `if` and `try` included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])


def _defines(node: ast.stmt, name: str) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name == name
    if isinstance(node, ast.AnnAssign):
        return isinstance(node.target, ast.Name) and node.target.id == name
    if isinstance(node, ast.ImportFrom):
        return any((alias.asname or alias.name) == name for alias in node.names)
    return False


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])
