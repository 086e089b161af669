# SPDX-License-Identifier: Apache-2.0
"""Tables of measured figures for the documents, from the committed CSV files."""

import csv
import json
from pathlib import Path
from statistics import median

from markdown_table import table

DOCS = Path(__file__).parents[1] / "docs"


def read(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file without the comments at its top, which name command and machine."""
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def quickstart() -> str:
    """What `scripts/quickstart.sh` printed, without the acceptance by depth."""
    rows = []
    for row in read(DOCS / "quickstart.csv"):
        corrected = "¹" if "chain" in row["method"] and row["temperature"] != "0" else ""
        rows.append(
            [
                row["method"] + corrected,
                row["temperature"],
                row["tokens_per_step"],
                row["ms_per_step"],
                row["tokens_per_s"],
                row["same_text_as_plain"],
            ]
        )
    return table(["method", "T", "tokens/step", "ms/step", "tokens/s", "same text as plain"], rows)


def demo_pair_step() -> str:
    """Steps of the demo pair while six requests decode: medians of their times over the
    repetitions."""
    measured = _by(read(DOCS / "benchmarks" / "demo_pair_step" / "measurements.csv"))
    rows = []
    for (temperature, _batch, method), repetitions in measured.items():
        if method != "plain":
            steps = [float(row["ms_per_step"]) for row in repetitions]
            spread = f"{min(steps):.1f} to {max(steps):.1f}"
            rows.append(
                [
                    temperature,
                    NAMES[method],
                    f"{_acceptance_length(repetitions):.2f}",
                    f"{median(steps):.1f}",
                    spread,
                ]
            )
    return table(["T", "method", "tokens/step", "ms/step", "lowest and highest"], sorted(rows))


def made_pair() -> str:
    """Tokens per second of the made pair, divided by plain vLLM's in the same repetition."""
    measured = _by(read(DOCS / "benchmarks" / "made_pair" / "measurements.csv"))
    ratios = {
        key: sorted(float(row["against_plain"]) for row in repetitions)
        for key, repetitions in measured.items()
    }
    columns = [["chain 2", "chain 4"], ["SpecHub"], ["SpecHub binary:2"]]
    rows = []
    for batch, temperature in sorted({(batch, t) for t, batch, _ in ratios}):
        cells = [batch, temperature]
        for methods in columns:
            best = max((ratios[temperature, batch, name] for name in methods), key=median)
            cells.append(f"{median(best):.2f} ({best[0]:.2f} to {best[-1]:.2f})")
        rows.append(cells)
    header = ["batch", "T", "best chain of 2 and 4", NAMES["SpecHub"], NAMES["SpecHub binary:2"]]
    return table(header, rows)


NAMES = {
    "chain 14": "vLLM chain of 14",
    "SpecHub": "SpecHub `binary:3`, 14 nodes",
    "SpecHub binary:2": "SpecHub `binary:2`, 6 nodes",
}
"""How the documents name the methods of `scripts/bench_e2e.py`."""


HEADS = {
    "chain 3": "vLLM's chain of 3, draft model",
    "SpecHub chain:3": "`chain:3`, draft model",
    "SpecHub": "`binary:3`, draft model",
    "vLLM EAGLE-3 chain 3": "vLLM's chain of 3, EAGLE-3 head",
    "EAGLE-3 chain:3": "`chain:3`, EAGLE-3 head",
    "EAGLE-3 binary:3": "`binary:3`, EAGLE-3 head",
}
"""How the documents name the methods of `docs/benchmarks/heads/measure.sh`."""
NGRAMS = {
    "plain": "plain vLLM",
    "vLLM ngram 8": "vLLM's `ngram`, 8 tokens",
    "ngram chain:8": "`ngram`, `chain:8`",
    "ngram caterpillar:8:2": "`ngram`, `caterpillar:8:2`",
    "SpecHub": "draft model, `binary:3`",
}
"""How the documents name the methods of `docs/benchmarks/ngram/measure.sh`."""


def heads(spread: bool = False) -> str:
    """Chains and trees of the demo target's draft model and of its EAGLE-3 head.

    Args:
        spread: whether to show the lowest and highest ratio of the step times, too.
    """
    measured = _by(read(DOCS / "benchmarks" / "heads" / "measurements.csv"))
    settings = list(dict.fromkeys((t, batch) for t, batch, _ in measured))
    rows = []
    for method, name in HEADS.items():
        cells = [name]
        for at in settings:
            cells.append(f"{_acceptance_length(measured[*at, method]):.2f}")
        for at in settings:
            steps = [
                float(row["ms_per_step"]) / float(plain["ms_per_step"])
                for row, plain in zip(measured[*at, method], measured[*at, "plain"], strict=True)
            ]
            range_ = f" ({min(steps):.1f} to {max(steps):.1f})" if spread else ""
            cells.append(f"{median(steps):.1f}{range_}")
        rows.append(cells)
    columns = ("tokens/step", "step time")
    return table(["method", *(f"{what}, T = {t}" for what in columns for t, _ in settings)], rows)


def ngrams() -> str:
    """The n-gram proposer on texts that repeat themselves; times are those of the fastest
    repetitions."""
    measured = _by(read(DOCS / "benchmarks" / "ngram" / "measurements.csv"))
    settings = list(dict.fromkeys((t, batch) for t, batch, _ in measured))

    def column(at: tuple[str, str], method: str, name: str) -> list[float]:
        return [float(row[name]) for row in measured[*at, method]]

    rows = []
    for method, name in NGRAMS.items():
        cells = [name]
        for at in settings:
            # of all steps and requests, as this proposer does not always draft
            steps = column(at, method, "ms_per_step"), column(at, method, "ms_per_output_token")
            cells.append(f"{median(step / token for step, token in zip(*steps, strict=True)):.2f}")
        for at in settings:
            fastest = (min(column(at, each, "ms_per_output_token")) for each in (method, "plain"))
            own, plain = fastest
            cells.append(f"{own / plain:.2f}")
        rows.append(cells)
    columns = ("tokens/step", "time per token")
    header = [f"{what}, {_requests(batch)}" for what in columns for _, batch in settings]
    return table(["method", *header], rows)


def _requests(batch: str) -> str:
    return f"{batch} request{'s' if batch != '1' else ''}"


def _acceptance_length(repetitions: list[dict[str, str]]) -> float:
    """The tokens per step of all repetitions together."""
    accepted = sum(sum(json.loads(row["accepted_by_depth"])) for row in repetitions)
    return 1 + accepted / sum(int(row["drafts"]) for row in repetitions)


def _by(rows: list[dict[str, str]]) -> dict[tuple[str, str, str], list[dict[str, str]]]:
    """The repetitions of each setting: temperature, batch, method."""
    settings: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        settings.setdefault((row["temperature"], row["batch"], row["method"]), []).append(row)
    return settings
