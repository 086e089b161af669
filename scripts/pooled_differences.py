#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Measure the differences between rules on the best trees that a study chose, and pool them.

The script reads the trees of `vllm-spechub simulate --out FOLDER` and measures them again, on more
texts than the study had: each setting's differences, and those of the mean over all settings'
trees, taken at every place before intervals are formed. Writes FOLDER/pooled.csv.
"""

import csv
import itertools
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from vllm_spechub.drafts.sources import Sources
from vllm_spechub.offline.simulation.drafts import Plan, Variant
from vllm_spechub.offline.simulation.load import load
from vllm_spechub.offline.simulation.report import ROWS_CSV, STUDY_JSON, read_csv
from vllm_spechub.offline.simulation.study import Row, Sampling, mean_and_ci, measure
from vllm_spechub.trees.tree import TokenTree

POOLED_CSV = "pooled.csv"
POOLED = ("all", "pooled")
"""The budget and kind of the rows over all settings."""
LAST_PHASE = 3
"""The study's phase whose texts its tables are measured on."""


def main(
    folder: Annotated[Path, typer.Argument(help="The study's folder.", file_okay=False)],
    temperature: Annotated[float, typer.Option("--temperature", "-T")] = 1.0,
    budget: Annotated[
        list[int], typer.Option("--nodes", "-n", help="Drafted nodes of the trees to pool.")
    ] = [14, 30],  # noqa: B006
    prompts: Annotated[Path, typer.Option(dir_okay=False, exists=True)] = Path(
        "scripts/demo_pair/study_prompts.jsonl"
    ),
    texts: Annotated[int, typer.Option(help="Texts for each prompt.")] = 60,
) -> None:
    """Measure differences over trees of several sizes and depths, and pool them."""
    settings = json.loads((folder / STUDY_JSON).read_text(encoding="utf-8"))["settings"]
    roots, seed, deepest = settings["roots_per_text"], settings["seed"], max(settings["depth"])
    sampling = Sampling(texts, settings["tokens"], roots, seed=seed)
    torch.set_num_threads(1)
    sources = Sources(settings["target"], settings["draft"])
    pair, encoded = load(sources, prompts, None, sampling, deepest, None, "float32")
    # by rule: the plan of every setting
    plans: dict[str, dict[tuple[int, str], Plan]] = {}
    for row in read_csv(Row, folder / ROWS_CSV):
        chosen = row.temperature == temperature and row.budget in budget
        if chosen and row.kind.startswith("best"):
            plan = Plan(Variant.parse(row.rule), TokenTree(row.tree))
            plans.setdefault(row.rule, {})[row.budget, row.kind] = plan
    every = [plan for by_setting in plans.values() for plan in by_setting.values()]
    found = measure(pair, encoded, every, temperature, sampling, LAST_PHASE)
    # by setting, and pooled: tokens per step of every rule at every place
    tokens: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for rule, by_setting in plans.items():
        values = {setting: found[plan].tokens for setting, plan in by_setting.items()}
        for (nodes, kind), value in values.items():
            tokens.setdefault((str(nodes), kind), {})[rule] = value
        tokens.setdefault(POOLED, {})[rule] = np.mean([*values.values()], axis=0)
    places = found[every[0]].prompts
    with (folder / POOLED_CSV).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["temperature", "budget", "kind", "rule", "baseline", "difference", "ci", "places"]
        )
        for setting, by_rule in tokens.items():
            for rule, baseline in itertools.permutations(by_rule, 2):
                mean, ci = mean_and_ci(by_rule[rule] - by_rule[baseline], places)
                numbers = f"{mean:.4f}", f"{ci:.4f}", len(places)
                writer.writerow([f"{temperature:g}", *setting, rule, baseline, *numbers])


if __name__ == "__main__":
    typer.run(main)
