# SPDX-License-Identifier: Apache-2.0
"""The table of estimated steps in docs/benchmarks.md."""

import csv
from pathlib import Path

from markdown_table import table

FILE = Path(__file__).parents[1] / "docs" / "benchmarks" / "compiled" / "estimate.csv"


def steps() -> str:
    """Milliseconds by batch size, for both versions of the kernels."""
    with FILE.open() as lines:
        rows = [*csv.DictReader(line for line in lines if not line.startswith("#"))]
    header = [
        "batch",
        "kernels",
        "verification, ms",
        "child sampling, ms",
        "models, ms",
        "step, ms",
    ]
    found = [
        [row["batch"], row["counts"].removesuffix(".csv"), *[*row.values()][2:]] for row in rows
    ]
    return table(header, sorted(found, key=lambda row: int(row[0])))
