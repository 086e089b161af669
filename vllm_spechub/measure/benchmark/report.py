# SPDX-License-Identifier: Apache-2.0
"""Present measurements as a table, a CSV file and a plot."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from vllm_spechub.measure.benchmark.decoding import acceptance_length
from vllm_spechub.measure.benchmark.interleaved import Point, Row
from vllm_spechub.measure.benchmark.methods import is_chain


@dataclass(frozen=True)
class Summary:
    """One method at one point, summarised over its repetitions."""

    method: str
    point: Point
    # medians
    tokens_per_s: float
    ms_per_output_token: float
    ms_per_step: float
    memory_gib: float
    # tokens/s divided by plain vLLM's in the same repetition: median, lowest and highest
    against_plain: float
    lowest: float
    highest: float
    # mean over all verified drafts
    tokens_per_step: float


def summarize(rows: Sequence[Row]) -> dict[Point, dict[str, Summary]]:
    """Summaries by point, then by method name."""
    by_point: dict[Point, dict[str, list[Row]]] = {}
    for row in rows:
        by_point.setdefault(row.run.point, {}).setdefault(row.method, []).append(row)
    return {
        point: {method: _summary(method, point, found) for method, found in methods.items()}
        for point, methods in by_point.items()
    }


def _summary(method: str, point: Point, rows: Sequence[Row]) -> Summary:
    ratios = [row.against_plain for row in rows]
    return Summary(
        method,
        point,
        median(row.tokens_per_s for row in rows),
        median(row.ms_per_output_token for row in rows),
        median(row.ms_per_step for row in rows),
        max(row.memory_gib for row in rows),
        median(ratios),
        min(ratios),
        max(ratios),
        pooled_acceptance_length(rows),
    )


def pooled_acceptance_length(rows: Sequence[Row]) -> float:
    """The acceptance length over several measurements taken together."""
    accepted = (count for row in rows for count in row.accepted_by_depth)
    return acceptance_length(sum(row.drafts for row in rows), accepted)


def best_chain(found: dict[str, Summary]) -> Summary | None:
    """The chain with the most tokens per second, or None if no chain was measured."""
    chains = [summary for method, summary in found.items() if is_chain(method)]
    return max(chains, key=lambda summary: summary.against_plain, default=None)


def shown(found: dict[str, Summary]) -> Iterator[tuple[str, Summary]]:
    """The labels and summaries to show: the best chain, and all methods that are not chains."""
    best = best_chain(found)
    for method, summary in found.items():
        if summary is best:
            yield f"best chain ({method.split()[-1]})", summary
        elif not is_chain(method):
            yield method, summary


def table(summaries: dict[Point, dict[str, Summary]]) -> Table:
    """A table with one section for each temperature and batch."""
    table = Table(title="Decoding at a constant batch", title_justify="left")
    for column in ("T", "batch", "method"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for column in (
        "tokens/s",
        "x plain",
        "lowest-highest",
        "x chain",
        "ms/token",
        "ms/step",
        "tokens/step",
        "GiB",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for point, found in sorted(summaries.items(), key=lambda item: item[0][::-1]):
        best = best_chain(found)
        for label, s in shown(found):
            over_best = f"{s.against_plain / best.against_plain:.2f}" if best else "-"
            table.add_row(
                f"{point.temperature:g}",
                str(point.batch),
                label,
                f"{s.tokens_per_s:.0f}",
                f"{s.against_plain:.2f}",
                f"{s.lowest:.2f}-{s.highest:.2f}",
                over_best,
                f"{s.ms_per_output_token:.2f}",
                f"{s.ms_per_step:.2f}",
                f"{s.tokens_per_step:.2f}",
                f"{s.memory_gib:.1f}",
            )
        table.add_section()
    return table


def write_csv(rows: Sequence[Row], path: Path, provenance: Sequence[str]) -> None:
    """Write one line per measurement, below comment lines with the provenance."""
    names = [field.name for field in fields(Row)]

    def cells(row: Row) -> Iterator[Any]:
        for value in (getattr(row, name) for name in names):
            if isinstance(value, tuple):
                yield json.dumps(value)
            else:
                yield f"{value:.5g}" if type(value) is float else value

    write_table(path, provenance, names, map(cells, rows))


def write_table(
    path: Path, provenance: Sequence[str], names: Sequence[str], rows: Iterable[Iterable[Any]]
) -> None:
    """Write a CSV file: comment lines with the provenance, the columns' names, the rows."""
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {line}\n" for line in provenance)
        csv.writer(file, lineterminator="\n").writerows([names, *rows])


def plot(summaries: dict[Point, dict[str, Summary]], path: Path) -> None:
    """Plot tokens/s relative to plain vLLM over the batch size, one panel per temperature."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    temperatures = sorted({point.temperature for point in summaries})
    size = (3.6 * len(temperatures) + 1.6, 3.4)
    figure, panels = pyplot.subplots(1, len(temperatures), figsize=size, sharey=True, squeeze=False)
    for panel, temperature in zip(panels.flat, temperatures, strict=True):
        lines: dict[str, list[Summary]] = {}
        for point, found in sorted(summaries.items()):
            if point.temperature == temperature:
                for method, summary in shown(found):
                    lines.setdefault(method.split(" (")[0], []).append(summary)
        for label, points in lines.items():
            batches = [s.point.batch for s in points]
            middle = [s.against_plain for s in points]
            below = [s.against_plain - s.lowest for s in points]
            above = [s.highest - s.against_plain for s in points]
            panel.errorbar(
                batches, middle, (below, above), fmt="o-", ms=3, lw=1, capsize=2, label=label
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted({p.batch for p in summaries}), minor=False)
        panel.get_xaxis().set_major_formatter("{x:g}")
        panel.set_title(f"T = {temperature:g}", fontsize=9)
        panel.grid(alpha=0.3)
    figure.supxlabel("requests decoding", fontsize=9)
    figure.supylabel("tokens/s relative to plain vLLM", fontsize=9)
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="center right", fontsize=8)
    figure.tight_layout(rect=(0, 0, 1 - 1.6 / size[0], 1))
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
