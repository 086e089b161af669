# SPDX-License-Identifier: Apache-2.0
"""Installs the package that docs/extending.md shows, as another package would be installed."""

import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vllm_spechub.registry import RULES

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


def code_block(first_line: str) -> str:
    """The page's code block that begins with a line."""
    blocks = re.findall(r"```\w+\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = (block for block in blocks if block.startswith(first_line + "\n"))
    return block


@contextmanager
def installed_rule(folder: Path) -> Iterator[str]:
    """Install the page's rule while the block lasts. Yields the rule's name."""
    package = folder / "my_package"
    package.mkdir()
    (package / "rules.py").write_text(code_block("# my_package/rules.py"))
    (points,) = tomllib.loads(code_block("# pyproject.toml"))["project"]["entry-points"].items()
    group, names = points
    metadata = folder / "my_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    lines = [f"[{group}]", *(f"{name} = {value}" for name, value in names.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(folder))
        RULES.__dict__.pop("_entries", None)  # entry points are read once
        try:
            yield from names
        finally:
            RULES.__dict__.pop("_entries", None)
