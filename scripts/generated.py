# SPDX-License-Identifier: Apache-2.0
"""Generated tables within pages that people write."""

from collections.abc import Mapping


def fill(page: str, source: str, texts: Mapping[str, str]) -> str:
    """Replace what stands between `<!-- NAME: SOURCE -->` and `<!-- end of NAME -->`.

    Args:
        page: the page in Markdown.
        source: what generates the texts, as the page's comments say it.
        texts: by name.

    Raises:
        ValueError: a text has no place in the page.
    """
    for name, text in texts.items():
        first, last = f"<!-- {name}: {source} -->\n", f"<!-- end of {name} -->"
        before, found, rest = page.partition(first)
        _, closed, after = rest.partition(last)
        if not (found and closed):
            raise ValueError(f"no place for {name!r} between {first!r} and {last!r}")
        page = f"{before}{first}\n{text}\n\n{last}{after}"
    return page
