# SPDX-License-Identifier: Apache-2.0
"""Installs the rule and the proposer in `examples/`, as another package would be installed."""

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.pair import ROOT
from vllm_spechub.registry import PROPOSERS, RULES

EXAMPLES = ROOT / "examples"
RULE, PROPOSER = "target_draw", "bigrams"


@contextmanager
def installed_examples(folder: Path) -> Iterator[None]:
    """Install the examples while the block lasts.

    Args:
        folder: an empty folder, for the package's metadata.
    """
    project = tomllib.loads((EXAMPLES / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, names in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in names.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.syspath_prepend(str(folder))
        for registry in (RULES, PROPOSERS):
            registry.__dict__.pop("_entries", None)  # entry points are read once
        try:
            yield
        finally:
            for registry in (RULES, PROPOSERS):
                registry.__dict__.pop("_entries", None)
