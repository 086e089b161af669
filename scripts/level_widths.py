#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Compare level widths with static trees, at the same places and with common noise.

For each setting, static trees are chosen for `traversal` and `mixed`, and level widths, on some
texts. They are measured on others. The figures of one pair and temperature replace those that
FOLDER/levels.csv had of them.
"""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from sharpened_draft import sharpened

from vllm_spechub.drafts.sources import Sources
from vllm_spechub.offline.simulation import study
from vllm_spechub.offline.simulation.drafts import Plan, Variant
from vllm_spechub.offline.simulation.load import load
from vllm_spechub.offline.simulation.study import Measured, Sampling, mean_and_ci
from vllm_spechub.trees.best_tree import best_shape
from vllm_spechub.trees.level_tree import width_candidates

LEVELS_CSV = "levels.csv"
RULES = ("traversal", "mixed")
RATED = ("ordered", "mixed")
"""Whose rates make the static trees to choose from: `traversal` takes those of `ordered`."""
COLUMNS = (
    "pair",
    "temperature",
    "budget",
    "depth",
    "widths",
    "tokens_per_step",
    "baseline",
    "difference",
    "ci",
    "places",
    "prompts",
)
OWN, OTHER = "levels", "levels, traversal"
"""The level widths, verified with `mixed`, and with another rule."""
POOLED = "all"
"""Stands for every setting of a temperature together."""
HERE = Path("scripts/demo_pair")

Setting = tuple[int, int]
"""Drafted nodes and levels."""


def static_plans(
    pair, encoded, temperature: float, settings: list[Setting], sampling: Sampling
) -> dict[Setting, list[Plan]]:
    """The static trees to choose from: for both rules, the best by either's rates."""
    deepest = max(depth for _, depth in settings)
    variants = [Variant(rule) for rule in RATED]
    rates = study.measure_rates(pair, encoded, variants, temperature, sampling, deepest)
    plans = {}
    for nodes, depth in settings:
        trees = dict.fromkeys(best_shape(rates[v], nodes, depth).tree for v in variants)
        plans[nodes, depth] = [Plan(Variant(rule), tree) for rule in RULES for tree in trees]
    return plans


def best(plans: list[Plan], found: dict[Plan, Measured]) -> Plan:
    """The plan with the most tokens per step."""
    return max(plans, key=lambda plan: float(found[plan].tokens.mean()))


def lines_of(
    pair, encoded, temperature: float, settings: list[Setting], sampling: Sampling
) -> list[list[str]]:
    """What is measured at one temperature, without the name of the pair."""
    trial = replace(sampling, texts=max(1, sampling.texts // 2))
    static = static_plans(pair, encoded, temperature, settings, trial)
    widths = {
        setting: [
            Plan(Variant("mixed"), tree)
            for tree in width_candidates(*setting, [plan.tree for plan in plans])
        ]
        for setting, plans in static.items()
    }
    every = [plan for plans in (*static.values(), *widths.values()) for plan in plans]
    tried = study.measure(pair, encoded, every, temperature, trial, 2)
    chosen: dict[Setting, dict[str, Plan]] = {}
    for setting, plans in static.items():
        by_rule = {
            rule: best([plan for plan in plans if plan.variant.rule == rule], tried)
            for rule in RULES
        }
        own = best(widths[setting], tried)
        other = Plan(Variant("traversal"), own.tree)
        chosen[setting] = by_rule | {"best": best(plans, tried), OTHER: other, OWN: own}
    every = [plan for plans in chosen.values() for plan in plans.values()]
    found = study.measure(pair, encoded, every, temperature, sampling, 3)

    lines, pooled = [], {}
    for (nodes, depth), plans in chosen.items():
        own = plans.pop(OWN)
        tree, levels = own.tree, found[own]
        for name, other in plans.items():
            differences = levels.tokens - found[other].tokens
            pooled.setdefault(name, []).append(differences)
            tokens = f"{levels.tokens.mean():.4f}"
            setting = str(nodes), str(depth), str(tree), tokens, name
            lines.append([*setting, *interval(differences, levels.prompts)])
    for name, parts in pooled.items():
        differences = np.mean(parts, axis=0)
        lines.append([POOLED, POOLED, "", "", name, *interval(differences, levels.prompts)])
    return lines


def interval(
    # [num_roots] each
    differences: np.ndarray,
    prompts: np.ndarray,
) -> list[str]:
    """A mean, the half width of its interval, and the numbers of places and prompts."""
    mean, ci = mean_and_ci(differences, prompts)
    return [f"{mean:.4f}", f"{ci:.4f}", str(len(prompts)), str(len(np.unique(prompts)))]


def main(
    folder: Annotated[Path, typer.Argument(help="Where levels.csv is.", file_okay=False)],
    name: Annotated[str, typer.Option(help="The pair's name in the table.")] = "draft model",
    draft: Annotated[str, typer.Option(help="The draft model or head.")] = str(HERE / "draft"),
    share: Annotated[
        float, typer.Option(help="The share of the target in the draft's log-probabilities.")
    ] = 0.0,
    temperature: Annotated[list[float], typer.Option("--temperature", "-T")] = [0.3, 0.6, 1.0],  # noqa: B006
    budget: Annotated[list[int], typer.Option("--nodes", "-n", help="Drafted nodes.")] = [14, 30],  # noqa: B006
    depth: Annotated[list[int], typer.Option("--depth", "-d")] = [4, 6],  # noqa: B006
    prompts: Annotated[Path, typer.Option(dir_okay=False, exists=True)] = (
        HERE / "study_prompts.jsonl"
    ),
    every: Annotated[int, typer.Option(help="Use every so many-th prompt.")] = 3,
    texts: Annotated[int, typer.Option(help="Texts for each prompt.")] = 12,
) -> None:
    """Measure level widths against static trees."""
    torch.set_num_threads(1)
    sampling = Sampling(texts=texts, seed=1)  # other texts than those that first gave widths
    sources = Sources(str(HERE / "target"), draft)
    pair, encoded = load(sources, prompts, None, sampling, max(depth), None, "float32")
    encoded = encoded[::every]
    if share:
        pair = sharpened(pair, share)
    settings = [(nodes, most) for nodes in budget for most in depth]
    file = folder / LEVELS_CSV
    kept: list[list[str]] = []
    if file.exists():
        with file.open(newline="", encoding="utf-8") as old:
            kept = list(csv.reader(old))[1:]
    for t in temperature:
        lines = lines_of(pair, encoded, t, settings, sampling)
        kept = [row for row in kept if row[:2] != [name, f"{t:g}"]]
        kept += [[name, f"{t:g}", *row] for row in lines]
        with file.open("w", newline="", encoding="utf-8") as new:
            writer = csv.writer(new, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(kept)


if __name__ == "__main__":
    typer.run(main)
