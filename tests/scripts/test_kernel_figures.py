# SPDX-License-Identifier: Apache-2.0
"""The committed figures of the compiled kernels, and the estimate that is made of them."""

import csv
from pathlib import Path

import kernel_figures
from typer.testing import CliRunner

FIGURES = Path(__file__).parents[2] / "docs" / "benchmarks" / "compiled"
LINES = (
    ".statistics, bf16, sm_90: Resources(registers=40, spill_bytes=0, shared_bytes=1024, warps=4, "
    "loops=(Loop(instructions=136, load_bytes=32, is_asynchronous=True, spills=False),)); more\n"
    "merge, head 80, bf16, sm_80: Resources(registers=255, spill_bytes=8, shared_bytes=0, warps=8, "
    "loops=())\n"
    "passed\n"
)


def rows_of(path: Path) -> list[dict[str, str]]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


def test_counts(tmp_path):
    out = tmp_path / "counts.csv"
    arguments = ["counts", str(out), "--kernels", "abc"]
    result = CliRunner().invoke(kernel_figures.app, arguments, input=LINES)
    assert result.exit_code == 0, result.output
    merge, statistics = rows_of(out)
    assert (merge["kernel"], merge["spill_bytes"], merge["loop"]) == ("merge, head 80", "8", "")
    assert int(merge["programs_per_sm"]) == 1  # 8 warps of 255 registers take all 65,536
    assert float(statistics["per_element"]) == 136 / 16
    # 12 programs of 4 warps fit; of each thread's 32 bytes, two iterations are under way
    assert int(statistics["programs_per_sm"]) == 12
    assert int(statistics["bytes_in_flight"]) == 32 * 32 * 4 * 12 * 2
    result = CliRunner().invoke(kernel_figures.app, arguments, input="nothing")
    assert result.exit_code == 2


def test_the_committed_estimate_is_that_of_the_committed_counts(tmp_path):
    out = tmp_path / "estimate.csv"
    files = [str(FIGURES / name) for name in ("before.csv", "after.csv")]
    result = CliRunner().invoke(kernel_figures.app, ["estimate", *files, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "not measured" in result.output
    assert rows_of(out) == rows_of(FIGURES / "estimate.csv")
