# SPDX-License-Identifier: Apache-2.0
"""Tables of measured figures for the documents, from the committed CSV files."""

import csv
import json
from pathlib import Path
from statistics import median

from markdown_table import table

from vllm_spechub.config import default_schedule_on_cuda
from vllm_spechub.trees.expert_cost import experts_read

SCRIPTS = Path(__file__).parent
DOCS = SCRIPTS.parent / "docs"


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


EXPERTS = {
    "Mixtral 8x7B": (8, 2),
    "Qwen3-30B-A3B": (128, 8),
    "DeepSeek V3": (256, 8),
    "gpt-oss-120b": (128, 4),
}
"""Experts of a layer, and how many of them a row chooses."""


def experts_read_by_rows() -> str:
    """The expected number of different experts that a layer reads, by the step's rows."""
    counts = (1, 2, 7, 15, 60, 240)
    rows = [
        [f"{name}, {k} of {e}", *(f"{experts_read(e, k, count):.0f}" for count in counts)]
        for name, (e, k) in EXPERTS.items()
    ]
    header = ["model", "1 row", *(f"{count} rows" for count in counts[1:])]
    return table(header, rows)


def schedules_for_experts() -> str:
    """The default schedules of targets with experts."""
    rows = []
    for name, (experts, chosen) in EXPERTS.items():
        ranges = default_schedule_on_cuda(experts, chosen).ranges
        shown = [f"{batch}: {f'`{batch.tree}`' if batch.tree else 'none'}" for batch in ranges]
        rows.append([name, "; ".join(shown)])
    return table(["model", "what is drafted for so many requests"], rows)


def expert_steps() -> str:
    """Steps of a made mixture of experts and of a dense model."""
    measured = read(DOCS / "benchmarks" / "experts" / "steps.csv")
    first = measured[0]
    rows = []
    for row in measured:
        cells = [row["rows"], row["experts_read"]]
        for name in ("experts_ms", "dense_ms"):
            ratio = float(row[name]) / float(first[name])
            cells.append(f"{float(row[name]):.1f} ({ratio:.1f} times)")
        rows.append(cells)
    return table(["rows", "experts read, expected", "experts, ms", "dense, ms"], rows)


def soak() -> str:
    """Each system's engine in random requests."""
    names = ("requests", "compared", "logprob_rows", "preemptions", "cached_tokens", "tokens")
    rows = []
    for row in read(DOCS / "benchmarks" / "soak" / "soak.csv"):
        quality = f"{row['accepted_when_new']}, {row['accepted_at_the_end']}"
        cells = [row["system"], *(row[name] for name in names), quality]
        rows.append([*cells, f"{row['mib_early']}, {row['mib_late']}", row["faults"]])
    heads = ["system", *(name.replace("_", " ") for name in names)]
    return table([*heads, "accepted per tree, new and at the end", "MiB", "faults"], rows)


LEVELS = 3
"""Of the tree that `scripts/bench_exits.py` drafts."""


def exits(target: str) -> str:
    """One demo target with drafts of several depths: tokens per step, speed beside plain vLLM's,
    and from which duration of a plain step a draft would pay. Medians of the rounds."""
    measured: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in read(DOCS / "benchmarks" / "exits" / "exits.csv"):
        if row["target"] == target:
            measured.setdefault((row["draft"], row["temperature"]), []).append(row)

    def middle(draft: str, temperature: str, what: str) -> float:
        return median(float(row[what]) for row in measured[draft, temperature])

    config = json.loads((SCRIPTS / "demo_pair" / target / "config.json").read_text())
    temperatures = list(dict.fromkeys(temperature for _, temperature in measured))
    rows = []
    for name in dict.fromkeys(draft for draft, _ in measured if draft != "plain"):
        tokens, speed, pays = [], [], []
        for t in temperatures:
            emitted, step = (middle(name, t, what) for what in ("tokens_per_step", "ms_per_step"))
            plain = middle("plain", t, "ms_per_step")
            # an exit's levels become longer with the target, each by its share of the layers
            share = int(name.split()[2]) / config["num_hidden_layers"]
            levels = LEVELS * share if name.startswith("early") else 0
            longer = (step - emitted * plain) / (emitted - 1 - levels)
            tokens.append(f"{emitted:.2f}")
            speed.append(f"{middle(name, t, 'speed'):.2f}")
            pays.append(f"{plain + max(longer, 0):.1f} ms")
        rows.append([name, *tokens, *speed, *pays])
    columns = ("tokens/step", "speed", "pays from")
    header = [f"{what}, T = {float(t):g}" for what in columns for t in temperatures]
    return table([f"draft for `{target}`", *header], rows)


def nested_overlap() -> str:
    """The nested draft's overlap by depth, beside the plain draft's."""
    card = json.loads((SCRIPTS / "demo_pair" / "nested" / "card.json").read_text())
    plain, nested = card["overlap_by_exit_before"], card["overlap_by_exit"]
    rows = [[layers, f"{plain[layers]:.3f}", f"{nested[layers]:.3f}"] for layers in nested]
    return table(["layers", "plain draft", "nested draft"], rows)


def exits_by_confidence() -> str:
    """Fixed exits and exits by confidence."""
    rows = []
    for row in read(DOCS / "benchmarks" / "exits" / "by_confidence.csv"):
        name, layers, overlap, agreement, *above = row.values()
        fixed = "layers" in name
        rows.append(
            [
                name.replace("max >", "best probability above"),
                f"{float(layers):.1f}",
                f"{float(overlap):.3f}",
                f"{float(agreement):.3f}",
                *("" if fixed else f"{float(value):+.3f}" for value in above),
            ]
        )
    header = ["exit", "mean layers", "overlap, T = 1", "agreement, T = 0"]
    return table([*header, "overlap against the line", "agreement against the line"], rows)


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


def heads() -> str:
    """Chains and trees of the demo target's draft model and of its EAGLE-3 head; times are those of
    the fastest repetitions."""
    measured = _by(read(DOCS / "benchmarks" / "heads" / "measurements.csv"))
    settings = list(dict.fromkeys((t, batch) for t, batch, _ in measured))

    def fastest(repetitions: list[dict[str, str]]) -> float:
        return min(float(row["ms_per_step"]) for row in repetitions)

    rows = []
    for method, name in HEADS.items():
        own = [measured[*at, method] for at in settings]
        plain = [measured[*at, "plain"] for at in settings]
        times = [fastest(mine) / fastest(plains) for mine, plains in zip(own, plain, strict=True)]
        tokens = [f"{_acceptance_length(mine):.2f}" for mine in own]
        rows.append([name, *tokens, *(f"{time:.1f}" for time in times)])
    columns = ("tokens/step", "step time")
    return table(["method", *(f"{what}, T = {t}" for what in columns for t, _ in settings)], rows)


def combined() -> str:
    """Tokens per step of the demo pair with combined targets, and speed against drafting nothing,
    medians of the rounds."""
    measured: dict[str, dict[str, list[dict[str, str]]]] = {}
    for row in read(DOCS / "benchmarks" / "combined" / "combined.csv"):
        if row["tree"] != "none":
            sharpened = "" if row["sharpening"] == "1" else f", `sharpening` {row['sharpening']}"
            by_target = measured.setdefault(f"`{row['tree']}`{sharpened}", {})
            by_target.setdefault(row["target"], []).append(row)
    rows = []
    for name, by_target in measured.items():
        cells = [name]
        for runs in by_target.values():
            emitted, speed = (
                median(float(run[what]) for run in runs) for what in ("tokens_per_step", "speed")
            )
            cells.append(f"{emitted:.2f}, {speed:.2f}x")
        rows.append(cells)
    return table(["tree", *next(iter(measured.values()))], rows)


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
