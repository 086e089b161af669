# SPDX-License-Identifier: Apache-2.0
"""A study as tables for the terminal, CSV, JSON and a plot."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import get_type_hints

from rich.table import Table

from vllm_spechub.offline.simulation.study import Row, Study
from vllm_spechub.offline.simulation.yardstick import Yardstick

ROWS_CSV, DIFFERENCES_CSV = "tokens_per_step.csv", "differences.csv"
YARDSTICK_CSV = "yardstick.csv"
STUDY_JSON, PLOT = "study.json", "tokens_per_step.png"


def _cell(value: float, ci: float) -> str:
    return f"{value:.3f} ± {ci:.3f}" if ci == ci else f"{value:.3f}"


def by_setting(rows: Sequence[Row]) -> dict[tuple[float, int], dict[tuple[str, str], Row]]:
    """Rows by (temperature, budget), and then by (rule, kind of shape)."""
    table: dict[tuple[float, int], dict[tuple[str, str], Row]] = {}
    for row in rows:
        table.setdefault((row.temperature, row.budget), {})[row.rule, row.kind] = row
    return table


def terminal_tables(study: Study) -> list[Table]:
    """Make one table of tokens per step for each temperature."""
    tables = []
    settings = by_setting(study.rows)
    kinds = list(dict.fromkeys(row.kind for row in study.rows))
    for temperature in dict.fromkeys(t for t, _ in settings):
        table = Table(title=f"tokens per step at T = {temperature:g}, with 95% intervals")
        for column in ("drafted nodes", "rule", *kinds):
            table.add_column(column, justify="left" if column == "rule" else "right")
        for (t, budget), cells in settings.items():
            if t != temperature:
                continue
            for rule in dict.fromkeys(rule for rule, _ in cells):
                found = [cells[rule, kind] for kind in kinds]
                texts = [_cell(row.tokens_per_step, row.ci) for row in found]
                table.add_row(str(budget), rule, *texts)
            table.add_section()
        tables.append(table)
    return tables


def yardstick_table(yardsticks: Sequence[Yardstick]) -> Table:
    """Make the table of acceptance beside its optimum."""
    table = Table(title="acceptance at one node, 8 tokens, and the optimum for its drafts")
    for column in ("T", "rule", "children", "acceptance", "optimum", "roots"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for y in yardsticks:
        accepted, optimum = f"{y.acceptance:.4f}", f"{y.optimum:.4f}"
        table.add_row(
            f"{y.temperature:g}", y.rule, str(y.children), accepted, optimum, str(y.roots)
        )
    return table


def write_csv(records: Sequence, path: Path) -> None:
    """Write one line for each record; tuples as JSON, floats with 5 digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = [field.name for field in fields(records[0])]
        writer.writerow(names)
        for record in records:
            values = [getattr(record, name) for name in names]
            writer.writerow(
                json.dumps(v) if isinstance(v, tuple) else round(v, 5) if type(v) is float else v
                for v in values
            )


def read_csv(kind: type, path: Path) -> list:
    """Read the records of a dataclass that `write_csv` wrote."""
    convert = get_type_hints(kind)
    records = []
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            records.append(
                kind(
                    **{
                        name: tuple(json.loads(text)) if name == "tree" else convert[name](text)
                        for name, text in line.items()
                    }
                )
            )
    return records


def save(study: Study, yardsticks: Sequence[Yardstick], settings: dict, folder: Path) -> None:
    """Write the CSV files, the JSON and the plot into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(study.rows, folder / ROWS_CSV)
    if study.differences:
        write_csv(study.differences, folder / DIFFERENCES_CSV)
    if yardsticks:
        write_csv(yardsticks, folder / YARDSTICK_CSV)
    record = {
        "settings": settings,
        "rows": [asdict(row) for row in study.rows],
        "differences": [asdict(difference) for difference in study.differences],
        "rates": study.rates,
    }
    (folder / STUDY_JSON).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    plot(study.rows, folder / PLOT)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot tokens per step over nodes: a line for each rule, a column of panels for each
    temperature, and a row of panels for each kind of shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    temperatures = list(dict.fromkeys(row.temperature for row in rows))
    kinds = list(dict.fromkeys(row.kind for row in rows))
    rules = list(dict.fromkeys(row.rule for row in rows))
    size = (3 * len(temperatures) + 1, 2.4 * len(kinds))
    figure, panels = pyplot.subplots(
        len(kinds), len(temperatures), figsize=size, sharex=True, sharey=True, squeeze=False
    )
    places = [(kind, temperature) for kind in kinds for temperature in temperatures]
    for panel, (kind, temperature) in zip(panels.flat, places, strict=True):
        for rule in rules:
            line = (temperature, rule, kind)
            found = [row for row in rows if (row.temperature, row.rule, row.kind) == line]
            nodes = [row.budget + 1 for row in found]
            panel.plot(nodes, [row.tokens_per_step for row in found], "o-", ms=3, lw=1, label=rule)
        panel.set_title(f"T = {temperature:g}, {kind}", fontsize=9)
        panel.set_xticks(sorted({row.budget + 1 for row in rows}))
        panel.grid(alpha=0.3)
    figure.supxlabel("nodes, the root included", fontsize=9)
    figure.supylabel("tokens per step", fontsize=9)
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="center right", fontsize=8)
    figure.tight_layout(rect=(0, 0, 1 - 1 / size[0], 1))
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
