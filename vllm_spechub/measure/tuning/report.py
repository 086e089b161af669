# SPDX-License-Identifier: Apache-2.0
"""Present the result of a tuning: a table, a plot, and the `--speculative-config`."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.table import Table

from vllm_spechub.measure.benchmark.report import summarize
from vllm_spechub.measure.tuning.run import TUNED, Tuned


def speculative_config(
    tuned: Tuned, draft: str, options: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """The `--speculative-config` that uses the tuned schedule, with a proposer's own options."""
    return {
        "method": "spechub",
        "model": draft,
        **options,
        "verification": tuned.rule,
        "tree_by_batch_size": tuned.schedule,
    }


def table(tuned: Tuned) -> Table:
    """For each batch: the chosen tree, its predicted and measured gain, and the best chain's length
    and gain."""
    title = f"Tokens/s relative to plain vLLM, verification {tuned.rule!r}"
    table = Table(title=title, title_justify="left")
    for column in ("batch", "tree", "predicted", "measured", "lowest-highest", "tokens/step"):
        table.add_column(column, justify="left" if column == "tree" else "right", no_wrap=True)
    table.add_column("best chain", justify="right", no_wrap=True)
    measured = {point.batch: found for point, found in summarize(tuned.checked).items()}
    for batch in tuned.plain:
        found = measured.get(batch, {})
        own = found.get(TUNED)
        chain = tuned.best_chain(batch)
        best = found.get(f"chain {chain}")
        table.add_row(
            str(batch),
            tuned.choice(batch) or "none",
            f"{tuned.predicted(batch):.2f}",
            f"{own.against_plain:.2f}" if own else "-",
            f"{own.lowest:.2f}-{own.highest:.2f}" if own else "-",
            f"{own.tokens_per_step:.2f}" if own else "-",
            f"{chain}: {best.against_plain if best else tuned.chains[chain].gain(batch):.2f}",
        )
    return table


def plot(tuned: Tuned, path: Path) -> None:
    """Plot tokens/s over the batch size for plain vLLM, its best chain, all trees that were tried,
    and the schedule as predicted and as measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batches = list(tuned.plain)
    figure, panel = pyplot.subplots(figsize=(7, 4))

    def line(label: str, gains: list[float], style: str, **options: Any) -> None:
        speeds = [gain * tuned.plain[b] for gain, b in zip(gains, batches, strict=True)]
        panel.plot(batches, speeds, style, ms=3, label=label, **options)

    line("plain vLLM", [1.0] * len(batches), "ko-", lw=1.5)
    best = [tuned.chains[tuned.best_chain(b)].gain(b) for b in batches]
    line("best chain", best, "s-", color="grey", lw=1.5)
    for name, curve in tuned.curves.items():
        line(name, [curve.gain(b) for b in batches], "o-", lw=0.8, alpha=0.7)
    line("schedule, predicted", [tuned.predicted(b) for b in batches], "r--", lw=2)
    measured = {point.batch: found for point, found in summarize(tuned.checked).items()}
    if all(TUNED in measured.get(b, {}) for b in batches):
        gains = [measured[b][TUNED].against_plain for b in batches]
        line("schedule, measured", gains, "r^", mec="k")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(batches)
    panel.get_xaxis().set_major_formatter("{x:g}")
    panel.set_xlabel("requests decoding")
    panel.set_ylabel("tokens/s")
    panel.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize=7)
    figure.tight_layout(rect=(0, 0, 0.75, 1))
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
