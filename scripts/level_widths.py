#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compare level widths with the best static trees that a study chose, at the same places.

The script reads the trees of `vllm-spechub simulate --out FOLDER`. For each setting it picks the
widths that do best with `mixed` on some texts, and measures them on others against the best static
trees of `traversal` and `mixed`. Writes FOLDER/levels.csv.
"""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from study_pair import load_study

from vllm_spechub.offline.simulation.drafts import Plan, Variant
from vllm_spechub.offline.simulation.report import ROWS_CSV, read_csv
from vllm_spechub.offline.simulation.study import Row, mean_and_ci, measure
from vllm_spechub.trees.level_tree import width_candidates
from vllm_spechub.trees.tree import TokenTree

LEVELS_CSV = "levels.csv"
RULE = "mixed"
BASELINES = ("traversal", "mixed")
PICK, MEASURE = 2, 3
"""The study's phases of texts: one to choose with, one to measure on."""


def main(
    folder: Annotated[Path, typer.Argument(help="The study's folder.", file_okay=False)],
    temperature: Annotated[list[float], typer.Option("--temperature", "-T")] = [0.3, 0.6, 1.0],  # noqa: B006
    budget: Annotated[list[int], typer.Option("--nodes", "-n", help="Drafted nodes.")] = [14, 30],  # noqa: B006
    depth: Annotated[list[int], typer.Option("--depth", "-d")] = [4, 6],  # noqa: B006
    prompts: Annotated[Path, typer.Option(dir_okay=False, exists=True)] = Path(
        "scripts/demo_pair/study_prompts.jsonl"
    ),
    limit: Annotated[int | None, typer.Option(help="Prompts to use.")] = None,
    texts: Annotated[int, typer.Option(help="Texts for each prompt.")] = 6,
) -> None:
    """Measure level widths against static trees."""
    pair, encoded, sampling = load_study(folder, prompts, limit, texts, max(depth))
    best: dict[tuple[float, int, int], dict[str, Plan]] = {}
    for row in read_csv(Row, folder / ROWS_CSV):
        for most in depth:
            chosen = row.temperature in temperature and row.budget in budget
            if chosen and row.kind == f"best, depth <= {most}" and row.rule in BASELINES:
                plan = Plan(Variant(row.rule), TokenTree(row.tree))
                best.setdefault((row.temperature, row.budget, most), {})[row.rule] = plan
    lines = []
    for t in temperature:
        candidates = {
            (nodes, most): [Plan(Variant(RULE), tree) for tree in width_candidates(nodes, most)]
            for nodes in budget
            for most in depth
        }
        every = [plan for plans in candidates.values() for plan in plans]
        trial = replace(sampling, texts=max(1, texts // 3))
        tried = measure(pair, encoded, every, t, trial, PICK)
        widths = {
            setting: max(plans, key=lambda plan: float(tried[plan].tokens.mean()))
            for setting, plans in candidates.items()
        }
        plans = [*widths.values()]
        plans += [plan for key, rules in best.items() if key[0] == t for plan in rules.values()]
        found = measure(pair, encoded, plans, t, sampling, MEASURE)
        for (nodes, most), plan in widths.items():
            tokens, places = found[plan].tokens, found[plan].prompts
            for rule, static in best[t, nodes, most].items():
                baseline = found[static].tokens
                mean, ci = mean_and_ci(tokens - baseline, places)
                numbers = (tokens.mean(), baseline.mean(), mean, ci)
                setting = f"{t:g}", nodes, most, rule
                sizes = len(places), len(np.unique(places))
                lines.append([*setting, *(f"{x:.4f}" for x in numbers), *sizes, str(plan.tree)])
                print(*lines[-1], flush=True)
    with (folder / LEVELS_CSV).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            [
                "temperature",
                "budget",
                "depth",
                "baseline",
                "tokens_per_step",
                "baseline_tokens",
                "difference",
                "ci",
                "places",
                "prompts",
                "widths",
            ]
        )
        writer.writerows(lines)


if __name__ == "__main__":
    typer.run(main)
