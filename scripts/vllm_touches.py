# SPDX-License-Identifier: Apache-2.0
"""Everything of vLLM that this package relies on, found in the package's own sources.

The patch ledger names what is replaced. The rest follows from the code: names that are imported,
methods that our subclasses override, attributes that they inherit, kernels that have a stand-in,
and the bodies of vLLM's functions that our code calls back into. `vllm_signatures.json` stores what
each looks like in every supported version; `check_vllm.py` compares sources with it.
"""

import ast
import hashlib
import inspect
import json
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import griffe
from vllm_source import PACKAGE, VllmSource

from vllm_spechub.cpu.vllm_kernels import HOST_KERNELS
from vllm_spechub.integration import patches, versions

OURS, LOGGER = "vllm_spechub", "vllm.spechub"
ROOT = Path(__file__).parents[1]
SIGNATURES = Path(__file__).with_name("vllm_signatures.json")

KINDS = {
    "names": "names that our code imports or looks up",
    "overridden": "methods and fields that our subclasses override",
    "inherited": "attributes that our subclasses inherit and use, and private attributes of other "
    "objects",
    "kernels": "Triton kernels with a stand-in, which takes the same arguments by position",
    "replaced": "functions and fields that the plugin replaces",
    "bodies": "functions of all these kinds, and constructors of base classes and methods called "
    "through `super()`: what they do; for kernels with the functions that they call",
}
"""The kinds of places that are compared."""

PRIVATE = {
    "_actions": "",  # argparse's
    "_counter_cls": "vllm.v1.spec_decode.metrics.SpecDecodingProm",
    "_get_constraint_bounds": "vllm.v1.structured_output.StructuredOutputManager",
    "_grammar_bitmask": "vllm.v1.structured_output.StructuredOutputManager",
    "_k_scale": "vllm.v1.attention.backend.AttentionLayer",
    "_k_scale_float": "vllm.v1.attention.backend.AttentionLayer",
    "_masked_reasoning_ends": "vllm.v1.structured_output.StructuredOutputManager",
    "_make": "",  # a named tuple's, as the next
    "_replace": "",
    "_modules": "",  # of PyTorch's modules
    "_last_mapping": "vllm.lora.model_manager.LoRAModelManager",
    "_run_model": "vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator.StandaloneARSpeculator",
    "_v_scale": "vllm.v1.attention.backend.AttentionLayer",
    "_v_scale_float": "vllm.v1.attention.backend.AttentionLayer",
}
"""The class that owns each private attribute that we use of objects other than `self`; "" if it is
not vLLM's."""

Facts = dict[str, dict[str, str]]
"""What vLLM's symbols look like, by kind and dotted name."""


@dataclass
class OurClass:
    """A class of ours: the dotted names of its bases and what its body does."""

    bases: list[str]
    defines: set[str] = field(default_factory=set)
    uses: set[str] = field(default_factory=set)
    calls_super: set[str] = field(default_factory=set)


class Sources:
    """This package's sources.

    Args:
        root: the folder that holds `vllm_spechub/`.
        version: the version of vLLM whose own module is read; with None, no version's.
    """

    def __init__(self, root: Path = ROOT, version: str | None = None) -> None:
        others = {module for key, module in versions.MODULES.items() if key != version}
        self.trees = {
            ".".join(file.relative_to(root).with_suffix("").parts): ast.parse(file.read_text())
            for file in sorted((root / OURS).rglob("*.py"))
            if file.stem not in others
        }

    def imports(self, module: str) -> dict[str, str]:
        """The dotted path that each imported name of a module stands for."""
        found = {}
        for node in ast.walk(self.trees[module]):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    top = alias.name.partition(".")[0]
                    found[alias.asname or top] = alias.name if alias.asname else top
            elif isinstance(node, ast.ImportFrom):
                found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        return found

    def names(self) -> Iterator[str]:
        """Yield vLLM's names that are imported or spelled out, and attributes looked up on them."""
        for module, tree in self.trees.items():
            imports = {k: v for k, v in self.imports(module).items() if _of_vllm(v)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    yield from (alias.name for alias in node.names if _of_vllm(alias.name))
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    if node.value.id in imports:
                        yield f"{imports[node.value.id]}.{node.attr}"
                elif isinstance(node, ast.Constant) and re.fullmatch(
                    rf"{PACKAGE}(\.\w+)+", str(node.value)
                ):
                    yield str(node.value)
            yield from imports.values()

    @cached_property
    def classes(self) -> dict[str, OurClass]:
        """Our classes by dotted name."""
        found = {}
        for module, tree in self.trees.items():
            names = self.imports(module)
            nodes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
            names |= {node.name: f"{module}.{node.name}" for node in nodes}
            for node in nodes:
                found[f"{module}.{node.name}"] = one = OurClass(
                    [names.get(ast.unparse(base), "") for base in node.bases]
                )
                for part in ast.walk(node):
                    _note(part, one)
        return found

    def ancestry(self, name: str) -> tuple[list[OurClass], list[str]]:
        """The class itself with its bases of ours, and the bases that are vLLM's."""
        one = self.classes[name]
        ours, theirs = [one], []
        for base in one.bases:
            if base in self.classes:
                more, bases = self.ancestry(base)
                ours, theirs = ours + more, theirs + bases
            elif _of_vllm(base):
                theirs.append(base)
        return ours, theirs

    def private(self) -> set[str]:
        """The private attributes that our code uses but no class of ours has."""
        used, ours = set(), set()
        for tree in self.trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    ours |= {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
                    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
                    ours |= {ast.unparse(part.target) for part in fields}
                elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                    own = ast.unparse(node.value) in ("self", "cls")
                    set_here = own and isinstance(node.ctx, ast.Store)
                    (ours if set_here else used).add(node.attr)
        return {name for name in used - ours if not name.startswith("__")}


def facts(source: VllmSource, ours: Sources) -> Facts:
    """Describe everything that we rely on, as it looks in a version's sources.

    Raises:
        LookupError: something that we rely on is not there.
    """
    symbols: dict[str, set[str]] = defaultdict(set)
    for name in ours.names():
        owner = source.find(name.rpartition(".")[0])
        of_an_object = owner is not None and (owner.is_alias or not _is_scope(owner))
        if name not in HOST_KERNELS and name != LOGGER and not of_an_object:
            symbols["names"].add(name)
    resolved = {name.rpartition(".")[2] for name in symbols["names"]}
    for name in ours.classes:
        classes, bases = ours.ancestry(name)
        defines = set().union(*(one.defines for one in classes))
        for base in bases:
            here = {f"{base}.{member}" for member in defines}
            symbols["overridden"] |= {symbol for symbol in here if source.find(symbol) is not None}
            uses = set().union(*(one.uses for one in classes)) - defines
            found = {member for member in uses if source.find(f"{base}.{member}") is not None}
            symbols["inherited"] |= {f"{base}.{member}" for member in found}
            resolved |= found
            bodies = {"__init__"}.union(*(one.calls_super for one in classes))
            bodies = {f"{base}.{member}" for member in bodies}
            symbols["bodies"] |= {s for s in bodies if _function(source.find(s))}
    for name in sorted(ours.private() - resolved):
        if name not in PRIVATE:
            raise LookupError(f"name the class that has {name}, in vllm_touches.PRIVATE")
        if PRIVATE[name]:
            symbols["inherited"].add(f"{PRIVATE[name]}.{name}")
    symbols["kernels"] |= set(HOST_KERNELS)
    symbols["replaced"] |= {patch.symbol.replace(":", ".") for patch in patches.ALL}
    for found in [*symbols.values()]:
        symbols["bodies"] |= {symbol for symbol in found if _function(source.find(symbol))}
    result = {kind: look(source, kind, sorted(symbols[kind])) for kind in KINDS}
    gone = [name for found in result.values() for name, looks in found.items() if not looks]
    if gone:
        raise LookupError(f"not in this vLLM: {', '.join(gone)}")
    return result


def look(source: VllmSource, kind: str, symbols: list[str]) -> dict[str, str]:
    """Describe what each symbol looks like in a version; "" if it is gone."""
    found = {symbol: source.find(symbol) for symbol in symbols}
    describe = (lambda one: body(source, one)) if kind == "bodies" else looks_like
    return {symbol: describe(one) if one is not None else "" for symbol, one in found.items()}


def looks_like(found: griffe.Object) -> str:
    """Describe a symbol in a line: a function's parameters, or else what kind of thing it is."""
    if found.is_alias:
        return f"is {found.target_path}"
    if not found.is_function:
        return "property" if "property" in found.labels else found.kind.value
    return f"{_prefix(found)}({', '.join(map(_parameter, found.parameters))})"


def body(source: VllmSource, found: griffe.Object) -> str:
    """Describe a body: a digest without documentation and comments, and the errors that it raises.

    The digest is of the lines, not of the syntax tree, whose text depends on Python's version. A
    Triton kernel's is also of the functions that it calls.
    """
    text, node = _parsed(source, found)
    if node is None:
        return looks_like(found)
    code = _code(text, node)
    if "triton.jit" in text.partition("def ")[0]:
        called = {found.path: code}
        _follow(source, found, node, called)
        code = "\n".join(called.values())
    raised = [one for one in ast.walk(node) if isinstance(one, ast.Raise)]
    errors = [" ".join((ast.get_source_segment(text, one) or "").split()) for one in raised]
    return "; ".join([hashlib.sha256(code.encode()).hexdigest()[:12], *errors])


def _parsed(
    source: VllmSource, found: griffe.Object
) -> tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | None]:
    """A definition's text, and its syntax tree if it is a function."""
    text = source.text_of(found)
    node = ast.parse(text).body[0]
    return text, node if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else None


def _code(text: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """A function's lines below its signature, without documentation, comments and indentation."""
    first = node.body[1 if ast.get_docstring(node) is not None and node.body[1:] else 0]
    lines = [line.strip() for line in text.splitlines()[first.lineno - 1 :]]
    return "\n".join(line for line in lines if line and not line.startswith("#"))


def _follow(
    source: VllmSource, found: griffe.Object, node: ast.AST, called: dict[str, str]
) -> None:
    """Add the code of the functions that a kernel calls by name, and of those that these call."""
    for one in ast.walk(node):
        if isinstance(one, ast.Call) and isinstance(one.func, ast.Name):
            function = source.find(f"{found.module.path}.{one.func.id}")
            if _function(function) and function.path not in called:
                text, below = _parsed(source, function)
                called[function.path] = _code(text, below)
                _follow(source, function, below, called)


def compare(source: VllmSource, expected: Mapping[str, Mapping[str, str]]) -> Facts:
    """Describe what differs in a version, by kind and symbol; "" where nothing does."""
    return {
        kind: {
            symbol: _difference(kind, expected[kind][symbol], found)
            for symbol, found in look(source, kind, sorted(expected[kind])).items()
        }
        for kind in KINDS
    }


def stand_in_problems(version: str, kernels: Mapping[str, str]) -> dict[str, str]:
    """Find a version's stand-ins that cannot take their kernel's arguments. Returns the errors by
    kernel.

    Args:
        version: a supported version.
        kernels: its kernels as `looks_like` describes them, by name.
    """
    stand_ins = {**HOST_KERNELS, **versions.record(version).host_kernels()}
    found = {}
    for name, parameters in kernels.items():
        arguments, options = _arguments(parameters)
        try:
            inspect.signature(stand_ins[name]).bind(*arguments, **dict.fromkeys(options, None))
        except TypeError as error:
            found[name] = str(error)
    return found


def stored() -> dict[str, Facts]:
    """Read what is expected: how everything looks, by supported version."""
    return json.loads(SIGNATURES.read_text(encoding="utf-8"))


def store(version: str, found: Facts) -> None:
    """Write what is expected of a supported version from now on, and drop versions that no longer
    are."""
    known = stored() | {version: found}
    kept = {key: known[key] for key in versions.MODULES if key in known}
    SIGNATURES.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def differences(old: Facts, new: Facts) -> dict[str, dict[str, str]]:
    """What looks different in another version, or is relied on in one of the two only, by kind."""
    return {
        kind: {
            symbol: _between(kind, old[kind].get(symbol), new[kind].get(symbol))
            for symbol in sorted(old[kind] | new[kind])
            if old[kind].get(symbol) != new[kind].get(symbol)
        }
        for kind in KINDS
    }


def _between(kind: str, old: str | None, new: str | None) -> str:
    if old is None or new is None:
        return "is used only with the newer version" if new else "is used only with the older one"
    return _difference(kind, old, new)


def _difference(kind: str, expected: str, found: str) -> str:
    if not found:
        return "is gone"
    if found == expected:
        return ""
    if kind == "bodies":
        old, new = (text.split("; ")[1:] for text in (expected, found))
        added = [line for line in new if line not in old]
        new = [f"new: {textwrap.shorten(line, 80, placeholder=' ...')}" for line in added]
        return "; ".join(["has another body", *new])
    if kind == "kernels":
        old, new = (len(_arguments(text)[0]) for text in (expected, found))
        if old != new:
            return f"takes {new} arguments by position, the stand-in {old}"
    return f"looks like {found}, expected {expected}"


def _arguments(kernel: str) -> tuple[list[str], list[str]]:
    """A kernel's parameters: those that launches pass by position, and its constants."""
    names = kernel.removeprefix("(").removesuffix(")").split(", ")
    options = [name.removesuffix(": constexpr") for name in names if name.endswith("constexpr")]
    return [name for name in names if not name.endswith("constexpr")], options


def _note(node: ast.AST, one: OurClass) -> None:
    if isinstance(node, ast.FunctionDef):
        one.defines.add(node.name)
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        one.defines.add(node.target.id)
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Call):
        if ast.unparse(node.value) == "super()":
            one.calls_super.add(node.attr)
        elif ast.unparse(node.value) in ("self", "cls"):
            (one.uses if isinstance(node.ctx, ast.Load) else one.defines).add(node.attr)


def _of_vllm(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


def _is_scope(found: griffe.Object) -> bool:
    return found.is_module or found.is_class


def _function(found: griffe.Object | None) -> bool:
    known = found is not None and not found.is_alias
    return known and (found.is_function or "property" in found.labels)


def _prefix(function: griffe.Function) -> str:
    return "".join(
        f"{label} "
        for label in ("async", "staticmethod", "classmethod")
        if label in function.labels
    )


def _parameter(parameter: griffe.Parameter) -> str:
    kinds = griffe.ParameterKind
    star = {kinds.var_positional: "*", kinds.var_keyword: "**"}.get(parameter.kind, "")
    if "constexpr" in str(parameter.annotation):
        return f"{parameter.name}: constexpr"
    only = " (keyword)" if parameter.kind is kinds.keyword_only else ""
    default = "=.." if parameter.default is not None and not star else ""
    return f"{star}{parameter.name}{default}{only}"
