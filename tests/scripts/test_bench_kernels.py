# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the kernels on a small grid, with the host versions."""

import csv
import os
import subprocess
import sys

import pytest

from helpers.pair import ROOT


def bench(*arguments):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"COLUMNS": "100"}
    command = [sys.executable, ROOT / "scripts" / "bench_kernels.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """The first line and the rows of every kernel's CSV."""
    folder = tmp_path_factory.mktemp("bench")
    kernels = "verification", "child_sampling"
    done = bench(*kernels, "--quick", "--only", "batch=1", "--only", "rule=mixed", "--out", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = "attention", "compaction"
    done = bench(*kernels, "--quick", "--only", "batch=1", "--only", "nodes=14", "--out", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for path in folder.glob("*.csv"):
        header, *lines = path.read_text().splitlines()
        found[path.stem.removesuffix("_cpu")] = header, list(csv.DictReader(lines))
        assert path.with_suffix(".png").stat().st_size > 5000
    return found


def test_every_kernel_is_measured(tables):
    assert {name: len(rows) for name, (_, rows) in tables.items()} == {
        "verification": 2,
        "child_sampling": 2,
        "attention": 4,
        "compaction": 2,
    }
    for header, rows in tables.values():
        for part in ("bench_kernels.py ", " --quick --only batch=1", "torch ", "commit ", " GB/s"):
            assert part in header
        for row in rows:
            ratio = float(row["us"]) / float(row["floor_us"]) if row["of_floor"] else 0.0
            assert ratio == pytest.approx(float(row["of_floor"] or 0), rel=0.02)


def test_rows_that_are_counted(tables):
    """At temperature 0 a walk needs one target row for each token that it emits."""
    row_bytes = 32_000 * 4
    for row in tables["verification"][1]:
        num_rows, tokens = int(row["bytes"]) // row_bytes, float(row["tokens_per_step"])
        if float(row["temperature"]) == 0:
            assert num_rows == tokens
        else:
            assert 2 * (tokens - 1) <= num_rows <= 7 + 7 + 1
    assert [int(row["bytes"]) for row in tables["child_sampling"][1]] == [4 * row_bytes] * 2


def test_what_is_compared_with(tables):
    assert all(float(row["vllm_us"]) > 0 for row in tables["attention"][1])
    assert all(float(row["vllm_us"]) > 0 for row in tables["child_sampling"][1])
    assert all(float(row["copy_us"]) > 0 for row in tables["compaction"][1])
    assert not any(row["vllm_us"] for row in tables["verification"][1])


def test_refusals(monkeypatch):
    done = bench("compaction")
    assert done.returncode == 2
    assert "give --quick on a CPU" in done.stderr

    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench_kernels import choose

    settings = [{"batch": 1, "vocab": 9}, {"batch": 4, "vocab": 9}]
    assert choose(settings, ["batch=4", "vocab=9"]) == settings[1:]
    with pytest.raises(ValueError, match="batch is one of 1, 4"):
        choose(settings, ["batch=3"])
    with pytest.raises(ValueError, match="columns are batch, vocab"):
        choose(settings, ["context=9"])


def test_a_wrong_kernel_stops_the_run(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import torch
    from bench_kernels import measure
    from kernel_benchmarks import compaction

    setting = compaction.QUICK[0]
    device = torch.device("cpu")
    assert measure(compaction, setting, device, 1e9)["error"] == "0"
    monkeypatch.setattr(compaction.KVCompactor, "__call__", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"'batch': 1.* exceeds 0"):
        measure(compaction, setting, device, 1e9)
