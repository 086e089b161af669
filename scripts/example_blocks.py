# SPDX-License-Identifier: Apache-2.0
"""Code blocks of the documents that show the files in `examples/`."""

import ast
import tomllib
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def code(name: str) -> str:
    """An example's code, without its docstring."""
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    docstring = ast.parse(source).body[0]
    lines = source.splitlines()[docstring.end_lineno :]
    return "\n".join(["", "```python", f"# {name}", *lines[1:], "```", "", ""])


def entry_points(group: str) -> str:
    """The entry points of one group, as the examples' project lists them."""
    project = tomllib.loads((EXAMPLES / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [f'{name} = "{value}"' for name, value in project["entry-points"][group].items()]
    title = f'[project.entry-points."{group}"]'
    return "\n".join(["", "```toml", "# pyproject.toml", title, *names, "```", "", ""])
