#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Soak one engine after the other, of every system that drafts trees, in random requests.

    python scripts/soak.py --seconds 150

Each engine has a KV cache and a token budget that are too small, and gets requests of all kinds:
images beside text for targets that read them, grammars, penalties, stop strings, seeds,
log-probabilities, streams, several samples; some are aborted, many begin alike, and some go on
where the answer to another ended. Answers that plain vLLM determines must be plain vLLM's, with
their log-probabilities; those of a combined target must be the ones that the two models give in
steps without trees. At the end no request may be lost or answered twice, nothing may be left of
any in the engine, every block must be free, memory must not have grown, and the engine must answer
quietly as it did when it was new, with drafts as good.
"""

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import json
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(1, str(Path(__file__).parents[1] / "tests"))  # engines, models, requests

PAIR = Path(__file__).parent / "demo_pair"
TARGET, EXIT_TARGET = str(PAIR / "target"), str(PAIR / "exit_target")
ROOMY = {"max_model_len": 224, "max_num_seqs": 12, "block_size": 32}
TIGHT = {"num_gpu_blocks_override": 20, "max_num_batched_tokens": 96}
UP_AND_DOWN = [[1, 1, None], [2, 4, "binary:3"], [5, 8, None], [9, None, "chain:2"]]
NO_TREES = [[1, 512, None], [513, None, "chain:1"]]
COLUMNS = (
    *("system", "requests", "aborted", "compared", "logprob_rows", "preemptions", "cached_tokens"),
    *("tokens", "steps", "accepted_when_new", "accepted_at_the_end", "mib_early", "mib_late"),
    *("seconds", "faults"),
)


@dataclass(frozen=True)
class Served:
    """What a system's engines are started with.

    Attributes:
        model: the target.
        prompts: with images; texts are added to them.
        options: of vLLM.
    """

    model: str = TARGET
    draft: str | None = str(PAIR / "draft")
    prompts: list = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class System:
    """One of the ways to draft, or one of the things to verify.

    Attributes:
        tree: a tree, or a schedule.
        verification: the rule; seeded requests are compared with `match`.
        spec: further options of spechub.
        serve: makes its models in a folder.
        options: of vLLM.
        images: whether its target reads images.
        extra_args: kinds of requests beyond the usual ones, if its target is combined.
    """

    tree: Any
    verification: str = "traversal"
    spec: dict[str, Any] = field(default_factory=dict)
    serve: Callable[[Path], Served] = lambda _: Served()
    options: dict[str, Any] = field(default_factory=dict)
    images: bool = False
    extra_args: dict[str, dict[str, Any]] = field(default_factory=dict)


def demo(model: str = TARGET, draft: str | None = "draft") -> Callable[[Path], Served]:
    """A target of the demo pair, and a draft of it, if any."""
    return lambda _: Served(model, draft and str(PAIR / draft))


def experts(family: str) -> Callable[[Path], Served]:
    """A tiny mixture of experts, with another as its draft."""

    def make(folder: Path) -> Served:
        from model_families import FAMILIES

        from helpers import models

        (found,) = (each for each in FAMILIES if each.name == family)
        return Served(*models.pair(found, folder))

    return make


def reading_images(kind: str) -> Callable[[Path], Served]:
    """The demo target with a vision tower, and prompts with images."""

    def make(folder: Path) -> Served:
        from helpers import multimodal

        target = multimodal.target(kind, folder)
        texts = ["def open(self):\n", "import os\n", "for i in range(", "class A:\n    def "]
        sides = (4, 8, 12)
        prompts = [
            {
                "prompt": before + target.mark * count + text,
                "multi_modal_data": {
                    "image": [
                        multimodal.image(7 * i + k, sides[(i + k) % 3], sides[i % 3])
                        for k in range(count)
                    ]
                },
            }
            for i, (text, count, before) in enumerate(
                (text, count, before)
                for text in texts
                for count in (1, 2)
                for before in ("", "x = 1\ny = [" + "2, " * 20 + "]\n")
            )
        ]
        options = {name: value for name, value in target.options.items() if name != "model"}
        return Served(target.folder, prompts=prompts, options=options)

    return make


PROCESSED = {"logprobs_mode": "processed_logprobs"}
OFF = {"target off": {"target_distribution": "off"}}
SYSTEMS = {
    "draft model": System("binary:3", options={"async_scheduling": True}),
    "schedule with null": System(UP_AND_DOWN, "match", options={"async_scheduling": True}),
    "level widths": System("levels:3,4,4", "mixed", options=PROCESSED),
    "ngram": System("caterpillar:4:2", "match", spec={"proposer": "ngram"}, serve=demo(draft=None)),
    "EAGLE-3 head": System("binary:3", "ordered", serve=demo(draft="eagle3")),
    "early exit": System(
        "binary:3",
        "match",
        spec={"proposer": "early_exit", "exit_layer": 2},
        serve=demo(EXIT_TARGET, None),
    ),
    "nested draft": System(
        "kary:3:2", "unordered", spec={"draft_layers": 6}, serve=demo(draft="nested")
    ),
    "mixture of target and draft": System(
        "binary:3",
        "match",
        spec={"target_distribution": {"type": "mixture", "weight": 0.4}},
        options=PROCESSED,
        extra_args=OFF | {"more of the draft": {"target_weight": 0.8}},
    ),
    "contrastive target": System(
        UP_AND_DOWN,
        spec={
            "target_distribution": {"type": "contrastive", "beta": 0.5, "alpha": 0.1},
            "sharpening": 2.0,
        },
        options=PROCESSED | {"async_scheduling": True},
        extra_args=OFF | {"more contrast": {"target_beta": 1.0}},
    ),
    "experts": System([[1, 2, None], [3, None, "binary:2"]], "match", serve=experts("Qwen 3 MoE")),
    "images (LLaVA)": System(
        "binary:3", serve=reading_images("llava"), options={"async_scheduling": True}, images=True
    ),
    "mixture with images (LLaVA)": System(
        "binary:3",
        "match",
        spec={"target_distribution": {"type": "mixture", "weight": 0.4}},
        options=PROCESSED,
        serve=reading_images("llava"),
        images=True,
        extra_args=OFF,
    ),
    "images (Qwen2-VL)": System(
        UP_AND_DOWN, "match", serve=reading_images("qwen2_vl"), images=True
    ),
}


def texts(rng: random.Random, count: int) -> list[dict]:
    """Pieces of Python code, one character long or longer. Each two begin alike."""
    from helpers.oracle import tokens_of

    lines = (PAIR / "study_prompts.jsonl").read_text().splitlines()
    source = "".join(json.loads(line)["turns"][0] for line in lines)
    starts = [rng.randrange(len(source) - 300) for _ in range(count // 2)]
    pieces = [source[start : start + rng.randint(1, 240)] for start in starts for _ in range(2)]
    return [{"prompt_token_ids": tokens_of(piece)} for piece in pieces]


def next_turns(prompts: list, known: dict, rng: random.Random) -> list[dict]:
    """Texts that go on where the answers to others end."""
    beginnings = {
        i: prompt["prompt_token_ids"]
        for i, prompt in enumerate(prompts)
        if "prompt_token_ids" in prompt
    }
    answers = {i: known[i, "plain"].token_ids[: -rng.randint(1, 9)] for i in beginnings}
    return [{"prompt_token_ids": beginnings[i] + answers[i]} for i in beginnings][::2]


def run(name: str, seconds: float, seed: int) -> list[str]:
    """Soak a system. Returns a row of the table."""
    from helpers import multimodal

    reading = multimodal.importable() if SYSTEMS[name].images else nullcontext()
    with TemporaryDirectory() as folder, reading:
        return _run(name, SYSTEMS[name], SYSTEMS[name].serve(Path(folder)), seconds, seed)


def _run(name: str, system: System, served: Served, seconds: float, seed: int) -> list[str]:
    from helpers.engines import engine, plain_engine
    from helpers.soak import GREEDY, SEEDED, known_answers, quietly, soak

    combined = "target_distribution" in system.spec
    greedy, seeded = dict(GREEDY), dict(SEEDED if system.verification == "match" else {})
    off = {k: {"extra_args": v} for k, v in system.extra_args.items() if k in OFF}
    other = {k: {"extra_args": v} for k, v in system.extra_args.items() if k not in OFF}
    options = {"model": served.model} | ROOMY | served.options | system.options
    rng = random.Random(seed)
    prompts = served.prompts + texts(rng, 24)
    trees = {"draft": served.draft, "verification": system.verification, "spec": system.spec}

    def without_trees():
        return engine(NO_TREES, **trees, **options) if combined else engine(**options)

    with without_trees() as llm:
        first = known_answers(llm, prompts, {"plain": {}})
        prompts += next_turns(prompts, first, rng)
        known = known_answers(llm, prompts, greedy | other | (seeded if combined else {}))
    if off:
        with engine(**options) as llm:
            plain = known_answers(llm, prompts, {kind: {} for kind in off})
        known |= plain
    if seeded and not combined:
        with plain_engine(**options) as llm:
            known |= known_answers(llm, prompts, seeded)

    with engine(system.tree, **trees, **options | TIGHT) as llm:
        new, accepted_when_new = quietly(llm, prompts)
        end = time.monotonic() + seconds
        kinds = greedy | off | other | seeded
        report = soak(llm, prompts, known, kinds, lambda _: time.monotonic() < end, seed)
        late, accepted = quietly(llm, prompts)
    faults = report.faults()
    wanted = [known[i, "plain"].token_ids for i in range(len(prompts))]
    for when, answers in (("when it was new", new), ("at the end", late)):
        wrong = [i for i, answer in enumerate(answers) if answer != wanted[i]]
        if wrong:
            faults.append(f"{len(wrong)} quiet answers {when} are wrong, such as to {wrong[0]}")
    early, last = report.memory()
    if last > early * 1.03:
        faults.append(f"memory grew from {early:.0f} to {last:.0f} MiB")
    if accepted < 0.9 * accepted_when_new:
        faults.append(f"drafts became worse: {accepted_when_new:.2f} to {accepted:.2f} accepted")
    for what, count in (
        ("nothing was preempted", report.preemptions),
        ("no prefix was found", report.cached_tokens),
        ("nothing was aborted", report.aborted),
        *((f"nothing was compared of kind {kind!r}", report.compared[kind]) for kind in kinds),
    ):
        if not count:
            faults.append(what)
    numbers = [report.requests, len(report.aborted), report.compared.total()]
    numbers += [report.rows_compared, report.preemptions, report.cached_tokens]
    numbers += [report.tokens, report.steps]
    quality = [f"{accepted_when_new:.3f}", f"{accepted:.3f}"]
    memory = [f"{early:.0f}", f"{last:.0f}", f"{report.seconds:.0f}"]
    return [name, *map(str, numbers), *quality, *memory, "; ".join(faults) or "none"]


def main(
    seconds: Annotated[float, typer.Option(help="How long each engine is soaked.")] = 150,
    system: Annotated[list[str] | None, typer.Option(help="A system; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="The seed of everything that is random.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A CSV file to write.")] = None,
) -> None:
    """Soak the systems, each in a process of its own. Exits with status 1 if anything is wrong."""
    from vllm_spechub.measure.benchmark.machine import provenance
    from vllm_spechub.measure.benchmark.report import write_table

    if unknown := set(system or ()) - SYSTEMS.keys():
        raise typer.BadParameter(f"{unknown}, allowed: {', '.join(SYSTEMS)}")
    about, rows = provenance(), []
    for name in system or SYSTEMS:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            try:
                row = process.submit(run, name, seconds, seed).result()
            except Exception as error:
                row = [name, *[""] * (len(COLUMNS) - 2), f"{type(error).__name__}: {error}"]
        rows.append(row)
        table = Table(show_header=False)
        for column, value in zip(COLUMNS, row, strict=True):
            table.add_row(column.replace("_", " "), value)
        Console().print(table)
    if out is not None:
        write_table(out, about, COLUMNS, rows)
    raise typer.Exit(any(row[-1] != "none" for row in rows))


if __name__ == "__main__":
    typer.run(main)
