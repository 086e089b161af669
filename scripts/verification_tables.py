# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/verification.md, made from the files in docs/verification/."""

import csv
import json
from pathlib import Path

from markdown_table import table

from vllm_spechub.offline.simulation.report import (
    DIFFERENCES_CSV,
    ROWS_CSV,
    STUDY_JSON,
    YARDSTICK_CSV,
    by_setting,
    read_csv,
)
from vllm_spechub.offline.simulation.study import Difference, Row, best_kind
from vllm_spechub.offline.simulation.yardstick import Yardstick
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels.rules import DEFAULT_RULE

FIGURES = Path(__file__).parents[1] / "docs" / "verification"
PAIRS = (
    ("ordered", "rrs"),
    ("traversal", "ordered"),
    ("traversal", "rrs"),
    ("traversal", "rrsw"),
)


def cell(value: float, ci: float, sign: str = "") -> str:
    """A mean with the half width of its confidence interval."""
    return f"{value:{sign}.3f} ± {ci:.3f}"


def study() -> dict:
    """The settings and acceptance rates of the recorded run."""
    return json.loads((FIGURES / STUDY_JSON).read_text(encoding="utf-8"))


def measured() -> list[Row]:
    """The tokens per step of the recorded run."""
    return read_csv(Row, FIGURES / ROWS_CSV)


def lengths(kind: str) -> str:
    """The table of tokens per step for one kind of shape, a column for each rule."""
    rows = measured()
    rules = list(dict.fromkeys(row.rule for row in rows))
    lines = []
    for (temperature, budget), found in by_setting(rows).items():
        cells = [found[rule, kind] for rule in rules]
        texts = [cell(row.tokens_per_step, row.ci) for row in cells]
        best = max(range(len(cells)), key=lambda i: cells[i].tokens_per_step)
        texts[best] = f"**{texts[best]}**"
        lines.append([f"{temperature:g}", str(budget + 1), *texts])
    return table(["T", "nodes", *rules], lines)


def differences() -> str:
    """The table of differences at equal roots and noise, a column for each pair of rules."""
    found = read_csv(Difference, FIGURES / DIFFERENCES_CSV)
    cells = {(d.temperature, d.budget, d.kind, d.rule, d.baseline): d for d in found}
    lines = []
    for temperature, budget, kind in dict.fromkeys(
        (d.temperature, d.budget, d.kind) for d in found
    ):
        pairs = [cells[temperature, budget, kind, *pair] for pair in PAIRS]
        texts = [cell(d.difference, d.ci, "+") for d in pairs]
        lines.append([f"{temperature:g}", str(budget + 1), kind, *texts])
    names = [f"{rule} - {other}" for rule, other in PAIRS]
    return table(["T", "nodes", "shape", *names], lines)


def refined() -> list[dict[str, str]]:
    """The differences on more texts that `pooled_differences.py` wrote."""
    with (FIGURES / "pooled.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_shape() -> str:
    """The differences on more texts, a column for each pair of rules."""
    cells: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for r in refined():
        text = cell(float(r["difference"]), float(r["ci"]), "+")
        cells.setdefault((r["budget"], r["kind"]), {})[r["rule"], r["baseline"]] = text
    pairs = [*PAIRS, ("mixed", "traversal")]
    lines = [
        [str(int(budget) + 1), kind, *(found[pair] for pair in pairs)]
        for (budget, kind), found in cells.items()
        if kind != "pooled"
    ]
    return table(["nodes", "shape", *(f"{rule} - {other}" for rule, other in pairs)], lines)


def pooled() -> str:
    """The differences from `traversal` over all shapes together."""
    lines = [
        [f"`{r['baseline']}`", cell(float(r["difference"]), float(r["ci"]), "+"), r["places"]]
        for r in refined()
        if (r["kind"], r["rule"]) == ("pooled", "traversal")
    ]
    return table(["`traversal` minus", "tokens per step", "places"], lines)


def costs() -> str:
    """What `rule_costs.py` timed, and from which step time on a rule pays more than the default.

    Tokens per time are `t / (s + c)` where `t` is tokens per step, `c` what the rule costs and `s`
    the rest of a step; two rules are equal at `s = (t_1 c_2 - t_2 c_1) / (t_2 - t_1)`.
    """
    with (FIGURES / "costs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    lines = []
    for r in sorted(rows, key=lambda r: r["kind"]):
        default = next(o for o in rows if (o["kind"], o["rule"]) == (r["kind"], DEFAULT_RULE))
        tokens, least = float(r["tokens_per_step"]), float(default["tokens_per_step"])
        cost, less = (float(o["sampling_us"]) + float(o["verification_us"]) for o in (r, default))
        more = tokens - least
        limit = (least * cost - tokens * less) / more / 1e3 if more else 0.0
        if r is default:
            pays = "the default"
        elif abs(more) < 0.005:
            pays = "as many tokens"
        elif more > 0:
            pays = f"if the rest takes more than {max(limit, 0):.1f} ms"
        else:
            pays = f"if the rest takes less than {limit:.1f} ms" if limit > 0 else "never"
        cells = f"{tokens:.2f}", f"{int(r['sampling_us']):,}", f"{int(r['verification_us']):,}"
        lines.append([r["kind"], f"`{r['rule']}`", *cells, pays])
    names = ["shape", "rule", "tokens/step", "sampling, µs", "verification, µs"]
    return table([*names, "more tokens per time than the default"], lines)


def slots() -> str:
    """The table of acceptance by slot, and in total, of nodes with 1 to 4 children."""
    rates = study()["rates"]
    lines = []
    for temperature in next(iter(rates.values())):
        for rule, by_temperature in rates.items():
            cells = []
            for by_slot in by_temperature[temperature].values():
                parts = " + ".join(f"{rate:.3f}"[1:] for rate in by_slot)
                total = f" = {sum(by_slot):.3f}" if len(by_slot) > 1 else ""
                cells.append(parts + total)
            lines.append([temperature, rule, *cells, *[""] * (4 - len(cells))])
    return table(["T", "rule", "1 child", "2 children", "3 children", "4 children"], lines)


def shapes() -> str:
    """The table of the best trees of 14 drafted nodes, of at most the study's first depth."""
    kind = best_kind(study()["settings"]["depth"][0])
    lines = [
        [f"{row.temperature:g}", row.rule, f"`{list(row.tree)}`", str(TokenTree(row.tree).depth)]
        for row in measured()
        if row.kind == kind and row.budget == 14
    ]
    return table(["T", "rule", "tree", "depth"], lines)


def optimum() -> str:
    """The table of acceptance at one node, beside the most that any rule could accept."""
    lines = [
        [
            f"{y.temperature:g}",
            y.rule,
            str(y.children),
            f"{y.acceptance:.4f}",
            f"{y.optimum:.4f}",
        ]
        for y in read_csv(Yardstick, FIGURES / YARDSTICK_CSV)
    ]
    return table(["T", "rule", "children", "acceptance", "optimum for its drafts"], lines)


def paper() -> str:
    """The table of published figures beside the demo pair's, on complete binary trees."""
    with (FIGURES / "paper.csv").open(newline="", encoding="utf-8") as file:
        published = list(csv.DictReader(file))
    columns = list(dict.fromkeys((r["target"], r["draft"], r["dataset"]) for r in published))
    found = {
        (float(r["temperature"]), int(r["nodes"]), r["target"], r["draft"], r["dataset"]): r
        for r in published
    }
    ours = by_setting(measured())
    lines = []
    for temperature, nodes in sorted({key[:2] for key in found}):
        texts = []
        for column in columns:
            r = found[temperature, nodes, *column]
            texts.append(" / ".join(f"{float(r[name]):.2f}" for name in ("rrs", "rrsw", "spechub")))
        demo = ours[temperature, nodes - 1]
        rules = ("rrs", "rrsw", "unordered", "traversal")
        texts.append(" / ".join(f"{demo[rule, 'complete'].tokens_per_step:.2f}" for rule in rules))
        lines.append([f"{temperature:g}", str(nodes), *texts])
    names = [f"{target}, {draft}, {data}" for target, draft, data in columns]
    return table(["T", "nodes", *names, "demo pair: rrs / rrsw / unordered / traversal"], lines)


def levels(pair: str) -> str:
    """The table of a pair's level widths beside the best static trees, by setting."""
    found: dict[tuple[str, str, str], dict[str, dict[str, str]]] = {}
    with (FIGURES / "levels.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["pair"] == pair:
                setting = row["temperature"], row["budget"], row["depth"]
                found.setdefault(setting, {})[row["baseline"]] = row
    lines = []
    for (temperature, budget, depth), rows in found.items():
        differences = [
            cell(float(rows[name]["difference"]), float(rows[name]["ci"]), "+")
            for name in ("traversal", "mixed", "best", "levels, traversal")
        ]
        own = rows["best"]
        if own["widths"]:
            size = [str(int(budget) + 1), depth, f"`{own['widths']}`"]
            tokens = f"{float(own['tokens_per_step']):.3f}"
        else:
            size, tokens = ["all", "", ""], ""
        lines.append([temperature, *size, tokens, *differences])
    head = ["T", "nodes", "depth", "widths", "tokens/step"]
    static = ["static, `traversal`", "static, `mixed`", "the better", "levels, `traversal`"]
    return table(head + [f"- {name}" for name in static], lines)


def level_steps() -> str:
    """The table of the steps of level widths beside those of static trees."""
    with (FIGURES / "level_steps.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    names = {"draft": "draft model", "eagle3": "EAGLE-3 head"}
    lines = [
        [
            names[row["draft"]],
            row["tree"],
            row["batch"],
            f"{float(row['static_ms']):.1f}",
            f"{float(row['ratio']):.2f} ({row['lowest'][:4]} to {row['highest'][:4]})",
        ]
        for row in rows
    ]
    head = ["draft", "tree", "requests", "static, ms", "by levels / static (rounds)"]
    return table(head, lines)
