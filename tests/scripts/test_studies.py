# SPDX-License-Identifier: Apache-2.0
"""The scripts that measure the trees of a stored study again, on one prompt."""

import csv
import shutil

import pytest

from helpers.pair import ROOT, SCRIPTS

STUDY = ROOT / "docs" / "verification"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.chdir(ROOT)
    for name in ("study.json", "tokens_per_step.csv"):
        shutil.copy(STUDY / name, tmp_path)
    return tmp_path


@pytest.fixture
def prompts(tmp_path):
    lines = (SCRIPTS / "demo_pair" / "study_prompts.jsonl").read_text().splitlines()
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines[:2]))
    return tmp_path / "prompts.jsonl"


def rows(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_level_widths(folder, prompts):
    """A draft that is the target itself is accepted wherever a node has children."""
    from level_widths import HERE, main

    main(folder, "itself", str(HERE / "draft"), 1.0, [1.0], [6], [3], prompts, 1, 1)
    main(folder, "pair", str(HERE / "draft"), 0.0, [1.0], [6], [3], prompts, 1, 1)
    found = rows(folder / "levels.csv")
    assert {row["baseline"] for row in found} == {"traversal", "mixed", "best", "levels, traversal"}
    (itself,), (pair,) = (
        {float(row["tokens_per_step"]) for row in found if row["pair"] == name and row["widths"]}
        for name in ("itself", "pair")
    )
    assert 1 < pair < itself - 0.5 < 3.5
    # with one setting, all together are that one
    single, pooled = (
        [row["difference"] for row in found if bool(row["widths"]) == one] for one in (True, False)
    )
    assert single == pooled


def test_pooled_differences(folder, prompts):
    from pooled_differences import main

    main(folder, 1.0, [14], prompts, 1)
    pooled = [row for row in rows(folder / "pooled.csv") if row["kind"] == "pooled"]
    by_pair = {(row["rule"], row["baseline"]): float(row["difference"]) for row in pooled}
    assert by_pair["traversal", "rrs"] == -by_pair["rrs", "traversal"]


def test_level_steps(folder, monkeypatch):
    import level_steps

    monkeypatch.setattr(level_steps, "TREES", {"small": ([0, 0, 1], "levels:2,1")})
    level_steps.main(folder / "steps.csv", ["draft"], "mixed", [2], 24, 1)
    lines = (folder / "steps.csv").read_text().splitlines()
    (row,) = csv.DictReader(line for line in lines if not line.startswith("#"))
    assert (row["draft"], row["tree"], row["batch"]) == ("draft", "small", "2")
    assert 0 < float(row["lowest"]) <= float(row["ratio"]) <= float(row["highest"])
