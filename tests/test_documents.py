# SPDX-License-Identifier: Apache-2.0
"""The documents: links lead somewhere, the README is short, and every refusal has its remedy."""

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from helpers.pair import ROOT

README = ROOT / "README.md"
DOCS = ROOT / "docs"
FOLDERS = ("docs", "examples", "scripts", "tests", "triton_kernels", "vllm_spechub")


def committed(*patterns: str) -> list[Path]:
    """The files that git knows or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in sorted(filter(None, listed.split("\0")))]


PAGES = committed("*.md")


@cache
def tokens(page: Path) -> list[Token]:
    parsed = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    return [part for token in parsed for part in (token, *(token.children or ()))]


def text_of(inline: Token) -> str:
    return "".join(child.content for child in inline.children or ())


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the page's headings."""
    found: list[str] = []
    for heading, inline in zip(tokens(page), tokens(page)[1:], strict=False):
        if heading.type == "heading_open":
            words = re.sub(r"[^\w\- ]", "", text_of(inline).lower()).replace(" ", "-")
            again = sum(
                re.fullmatch(rf"{re.escape(words)}(-\d+)?", other) is not None for other in found
            )
            found.append(f"{words}-{again}" if again else words)
    return set(found)


def links(page: Path) -> Iterator[str]:
    for token in tokens(page):
        target = token.attrGet("href") or token.attrGet("src")
        if target is not None and "://" not in str(target):
            yield unquote(str(target))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: there is no such file"
        if anchor:
            assert anchor in anchors(file), f"{target}: the page has {sorted(anchors(file))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    for token in tokens(page):
        if token.type == "code_inline":
            name = token.content.split("::")[0]
            if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./*-]+", name):
                assert any(ROOT.glob(name)), f"{name} does not exist"


def test_the_index_has_every_page():
    listed = {(DOCS / target.partition("#")[0]).resolve() for target in links(DOCS / "index.md")}
    assert {page for page in PAGES if page.parent == DOCS} - {DOCS / "index.md"} <= listed


def test_the_readme_is_short():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    shown = [re.sub(r"\]\([^)]*\)", "]", line) for line in lines if line.startswith("|")]
    assert max(map(len, shown)) <= 100


NOT_FOR_USERS = {
    # functions of the library: the message names the argument and what it must be
    "offline/draft_and_verify.py",
    "rules/acceptance.py",
    "rules/optimum.py",
    # what only a fault of this package could raise
    "integration/import_path.py",
    "integration/messages.py",
    "measure/benchmark/interleaved.py",
}
SOURCES = [
    *(
        p
        for p in committed("vllm_spechub/*.py")
        if str(p.relative_to(ROOT / "vllm_spechub")) not in NOT_FOR_USERS
    ),
    ROOT / "triton_kernels" / "rules.py",
]
ERRORS = {
    "ArgumentTypeError",
    "ChildProcessError",
    "PatchMismatch",
    "RuntimeError",
    "SystemExit",
    "Unsupported",
    "VLLMValidationError",
    "ValueError",
}
ANYTHING = ".*"


def patterns_of(source: Path) -> Iterator[str]:
    """Regular expressions for the messages of the errors that a module makes."""
    module = ast.parse(source.read_text(encoding="utf-8"))
    constants = {
        node.targets[0].id: str(node.value.value)
        for node in module.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }

    def pattern(message: ast.expr) -> str:
        match message:
            case ast.Constant(value=str(text)):
                return re.escape(text)
            case ast.JoinedStr(values=parts):
                return "".join(map(pattern, parts))
            case ast.FormattedValue(value=ast.Name(id=name)) if name in constants:
                return re.escape(constants[name])
            case ast.BinOp(left=left, right=right):
                return pattern(left) + pattern(right)
        return ANYTHING

    for node in ast.walk(module):
        match node:
            case ast.Call(func=ast.Name(id=name), args=[message, *_]) if name in ERRORS:
                pass
            case ast.Yield(value=ast.Tuple(elts=[condition, message])) if not isinstance(
                condition, ast.Constant
            ):
                pass  # a refusal with the condition under which it applies
            case ast.Return(value=ast.JoinedStr() as message) if source.name == "validation.py":
                pass
            case _:
                continue
        # one that only hands on another's message says nothing by itself
        ends = [message.values[0], message.values[-1]] if isinstance(message, ast.JoinedStr) else []
        hands_on = any(
            isinstance(end, ast.FormattedValue) and ast.unparse(end.value) in ("error", "message")
            for end in ends
        )
        found = pattern(message)
        if not hands_on and len(re.findall("[a-z]", found.replace(ANYTHING, ""))) >= 6:
            yield found


def messages_on_the_page() -> Iterator[str]:
    """The messages with which the page's list items begin."""
    parts = tokens(DOCS / "troubleshooting.md")
    for item, inline in zip(parts, parts[2:], strict=False):
        if (
            item.type == "list_item_open"
            and inline.children
            and inline.children[0].type == "code_inline"
        ):
            yield inline.children[0].content.strip()


def refusals() -> list[tuple[str, str]]:
    """The file and the pattern of every message."""
    return [(str(p.relative_to(ROOT)), pattern) for p in SOURCES for pattern in patterns_of(p)]


def is_one_of(message: str, pattern: str) -> bool:
    """Whether a message on the page, with what stands before it, is one of the code."""
    return re.fullmatch(rf"(?:.*: )?{pattern}", message) is not None


def test_every_refusal_has_its_remedy():
    listed = list(messages_on_the_page())
    assert len(listed) > 100
    missing = [
        f"{source}: {pattern}"
        for source, pattern in refusals()
        if not any(is_one_of(message, pattern) for message in listed)
    ]
    assert not missing, "docs/troubleshooting.md has no item for:\n" + "\n".join(missing)


def test_every_message_on_the_page_is_one_of_the_code():
    patterns = [pattern for _, pattern in refusals()]
    stale = [
        message
        for message in messages_on_the_page()
        if not any(is_one_of(message, pattern) for pattern in patterns)
    ]
    assert not stale, "docs/troubleshooting.md has items for:\n" + "\n".join(stale)
