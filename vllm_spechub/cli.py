# SPDX-License-Identifier: Apache-2.0
"""`vllm-spechub`: choose rules and tree shapes for a pair of models."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"vllm-spechub needs {error.name}: pip install 'vllm-spechub[cli]'") from None

from vllm_spechub.triton_kernels.rules import DEFAULT_RULE

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Lossless tree speculation for a pair of models: simulate rules, choose shapes, look on.",
)
# Results go to the standard output, everything else beside it.
output, notes = Console(), Console(stderr=True)

Target = Annotated[str, typer.Argument(help="The target: a Hugging Face folder or name.")]
Draft = Annotated[str, typer.Argument(help="The draft, over the same vocabulary.")]
Prompts = Annotated[
    Path,
    typer.Option(
        help="Prompts: JSON lines with `turns` or `prompt`, or text with one prompt per line.",
        exists=True,
        dir_okay=False,
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Use the first so many prompts.")]
Temperatures = Annotated[
    list[float], typer.Option("--temperature", "-T", min=0.0, help="May be repeated.")
]
MAX_DEPTH = 16
Texts = Annotated[int, typer.Option(min=1, help="Texts sampled from the target for each prompt.")]
Tokens = Annotated[int, typer.Option(min=4, help="Tokens of each text.")]
Seed = Annotated[int, typer.Option(min=0, help="Equal seeds give equal results.")]
Device = Annotated[str | None, typer.Option(help="CUDA if there is one, else the CPU.")]
Dtype = Annotated[str, typer.Option(help="Of both models: float32, bfloat16 or float16.")]


@app.command()
def simulate(
    target: Target,
    draft: Draft,
    prompts: Prompts,
    limit: Limit = None,
    temperature: Temperatures = (0.3, 0.6, 1.0),
    rule: Annotated[
        list[str],
        typer.Option(
            "--rule",
            "-r",
            help="A rule, or RULE@SHARPENING; may be repeated.",
            show_default="all rules",
        ),
    ] = (),
    nodes: Annotated[
        list[int], typer.Option("--nodes", "-n", help="Drafted nodes at most; may be repeated.")
    ] = (6, 14, 30),
    depth: Annotated[
        list[int],
        typer.Option(
            "--depth", "-d", min=1, max=MAX_DEPTH, help="Depth cap of best shapes; may be repeated."
        ),
    ] = (5,),
    texts: Texts = 40,
    tokens: Tokens = 48,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for CSV, JSON and a plot.", file_okay=False)
    ] = None,
    small: Annotated[
        bool,
        typer.Option(
            "--small", help="Also compare acceptance with the optimum, on small vocabularies."
        ),
    ] = False,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Tokens per step of every rule, on complete trees and on its own best shape.

    Teacher-forced: trees hang from places in texts that the target has sampled, every place counts
    alike, and what verification would accept is computed from the drafted tree, not tossed.
    """
    with _usage_errors():
        from vllm_spechub.offline.simulation import report, study, yardstick

        variants = _variants(rule)
        _check_nodes(nodes)
        pair, encoded, sampling = _load(
            target, draft, prompts, limit, texts, tokens, seed, max(depth), device, dtype
        )
        with _progress() as progress:
            found = study.run_study(
                pair, encoded, variants, temperature, nodes, depth, sampling, progress
            )
    for table in report.terminal_tables(found):
        output.print(table)
    yardsticks = []
    if small:
        for t in temperature:
            if t > 0:
                yardsticks += yardstick.run_yardstick(pair, encoded, variants, t, sampling)
        output.print(report.yardstick_table(yardsticks))
    if out is not None:
        settings = _settings(target, draft, encoded, sampling, list(depth)) | {"dtype": dtype}
        report.save(found, yardsticks, settings, out)
        notes.print(f"written to {out}")


@app.command()
def shape(
    target: Target,
    draft: Draft,
    prompts: Prompts,
    limit: Limit = None,
    rule: Annotated[
        str, typer.Option("--rule", "-r", help="The rule, or RULE@SHARPENING.")
    ] = DEFAULT_RULE,
    temperature: Temperatures = (1.0,),
    nodes: Annotated[int, typer.Option("--nodes", "-n", min=1, max=63, help="Drafted nodes.")] = 15,
    depth: Annotated[
        int, typer.Option("--depth", "-d", min=1, max=MAX_DEPTH, help="Depth cap.")
    ] = 5,
    texts: Texts = 10,
    tokens: Tokens = 48,
    seed: Seed = 0,
    rates_file: Annotated[
        Path | None,
        typer.Option("--rates", help="Also write every rule's rates by temperature, as JSON."),
    ] = None,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """The best tree for a pair of models, as JSON that "tree" accepts.

    Measures how often the child of each slot is accepted, averaged over the temperatures, finds
    the tree that accepts the most tokens per step by these rates, and simulates it on fresh texts.
    """
    with _usage_errors():
        from vllm_spechub.offline.simulation import study
        from vllm_spechub.offline.simulation.drafts import Variant
        from vllm_spechub.trees import best_tree

        (variant,) = _variants([rule])
        pair, encoded, sampling = _load(
            target, draft, prompts, limit, texts, tokens, seed, depth, device, dtype
        )
        # Its own rates and those that guide it instead; the simulation decides.
        guide = Variant(best_tree.GUIDES.get(variant.rule, variant.rule), variant.sharpening)
        guides = list(dict.fromkeys([variant, guide]))
        variants = list(dict.fromkeys([*guides, *(_variants(()) if rates_file else [])]))
        rates: dict[Variant, dict[str, best_tree.Rates]] = {}
        with _progress() as progress:
            for t in temperature:
                measured = study.measure_rates(
                    pair, encoded, variants, t, sampling, depth, progress
                )
                for each, by_slot in measured.items():
                    rates.setdefault(each, {})[f"{t:g}"] = by_slot
            average = {each: best_tree.average_rates(list(rates[each].values())) for each in guides}
            trees = [
                best_tree.best_shape(by_slot, nodes, depth).tree for by_slot in average.values()
            ]
            tree, tokens_per_step = study.pick_tree(
                pair, encoded, variant, trees, temperature, sampling, progress
            )
    table = Table(title=f"{variant}: acceptance by slot, T = {', '.join(map(str, temperature))}")
    for column in ("children", "slot 1", "slot 2", "slot 3", "slot 4"):
        table.add_column(column, justify="right")
    for k, by_slot in average[variant].items():
        table.add_row(str(k), *(f"{value:.3f}" for value in by_slot))
    notes.print(table)
    notes.print(
        f"{tree.num_nodes} nodes, depth {tree.depth}, {tokens_per_step:.2f} tokens per step"
    )
    if rates_file is not None:
        settings = _settings(target, draft, encoded, sampling, depth)
        record = {"settings": settings, "rates": _rounded(rates)}
        rates_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(list(tree.parents)))


@app.command()
def explain(
    target: Target,
    draft: Draft,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    tree: Annotated[
        str, typer.Option(help="As `tree` in --speculative-config, a list of parents as JSON.")
    ] = "binary:3",
    rule: Annotated[str, typer.Option("--rule", "-r", help="The verification rule.")] = (
        DEFAULT_RULE
    ),
    temperature: Annotated[float, typer.Option("--temperature", "-T", min=0.01)] = 1.0,
    steps: Annotated[int, typer.Option(min=1, help="Steps to decode.")] = 3,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="A picture instead of text: FILE.png or FILE.html.")
    ] = None,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Each step's tree for one prompt: tokens, their probabilities, what was accepted, and where
    the walk ended. q is the draft's probability below the parent, p the target's."""
    with _usage_errors():
        from vllm_spechub.offline import explain
        from vllm_spechub.offline.simulation.load import load_pair
        from vllm_spechub.trees.best_tree import parse_tree

        if out is not None and out.suffix not in (".png", ".html"):
            raise ValueError(f"--out must end in .png or .html, got {out.name!r}")
        shape = parse_tree(json.loads(tree) if tree.startswith("[") else tree, rule)
        pair = load_pair(target, draft, device, dtype)
        encoded = pair.encode(prompt, pair.max_positions)
        trace = explain.trace(pair, encoded, shape, rule, temperature, steps, seed)
    if out is None:
        explain.render(trace, output)
    elif out.suffix == ".png":
        explain.save_picture(trace, out)
    else:
        page = Console(record=True, file=io.StringIO(), width=120)
        explain.render(trace, page)
        page.save_html(str(out))
    if out is not None:
        notes.print(f"written to {out}")


@app.command()
def tune(
    target: Target,
    draft: Annotated[str, typer.Option(help="The draft, over the same vocabulary.")],
    prompts: Prompts,
    limit: Limit = None,
    rule: Annotated[
        list[str],
        typer.Option("--rule", "-r", help="A rule to choose from.", show_default="all for trees"),
    ] = (),
    temperature: Annotated[float, typer.Option("--temperature", "-T", min=0.0)] = 1.0,
    nodes: Annotated[
        list[int], typer.Option("--nodes", "-n", min=1, max=63, help="Drafted nodes to try.")
    ] = (2, 4, 8, 16, 32),
    chain: Annotated[
        list[int], typer.Option("--chain", "-K", min=1, help="Lengths of vLLM's chain to try.")
    ] = (1, 2, 4, 8),
    batch: Annotated[
        list[int], typer.Option("--batch", "-b", min=1, help="Running requests to try.")
    ] = (1, 2, 4, 8, 16, 32, 64),
    texts: Texts = 10,
    tokens: Annotated[int, typer.Option(min=4, help="Of each text and each request.")] = 64,
    repetitions: Annotated[int, typer.Option(min=1, help="Of every measurement.")] = 3,
    resident: Annotated[
        int | None,
        typer.Option(min=1, help="Engines at once.", show_default="all on the CPU, else 3"),
    ] = None,
    engine: Annotated[str, typer.Option(help="Your engine's options, as JSON.")] = "{}",
    out: Annotated[Path, typer.Option(help="The JSON file to write.", dir_okay=False)] = Path(
        "spechub-tuned.json"
    ),
) -> None:
    """Trees for every number of requests, measured on this machine with your prompts.

    Writes a JSON file for --speculative-config, a plot, a CSV and a state file. Interrupt it when
    you like: the same command goes on where it was.
    """
    from vllm_spechub.measure.benchmark.engine import EngineFailed

    with _usage_errors():
        from vllm_spechub.measure.benchmark.machine import provenance
        from vllm_spechub.measure.benchmark.report import write_csv
        from vllm_spechub.measure.tuning import report
        from vllm_spechub.measure.tuning.run import Asked, Tuning
        from vllm_spechub.measure.tuning.state import State
        from vllm_spechub.trees import measured_schedule

        rules = tuple(v.rule for v in _variants(rule) if v.rule != "chain")
        asked = Asked(
            target,
            draft,
            prompts,
            limit,
            rules,
            temperature,
            *(tuple(sorted({*numbers})) for numbers in (nodes, chain, batch)),
            texts,
            tokens,
            repetitions,
            json.loads(engine),
        )
        about = provenance()
        state = State.load(out.with_suffix(".state.json"), asked.settings)
        try:
            tuned = Tuning(asked, state, resident, notes).run()
        except KeyboardInterrupt:
            notes.print(f"stopped; the same command goes on from {state.path}")
            raise typer.Exit(130) from None
        except EngineFailed as failure:
            notes.print(str(failure), markup=False)
            raise ValueError("plain vLLM's engine stopped; its last lines are above") from None
    output.print(report.table(tuned))
    report.plot(tuned, out.with_suffix(".png"))
    write_csv(list(state.rows.values()), out.with_suffix(".csv"), about)
    kept = measured_schedule.keep(target, draft, tuned.rule, tuned.schedule)
    if not tuned.speculates:
        notes.print("no tree was faster than plain vLLM here: leave speculation off")
        return
    config = json.dumps(report.speculative_config(tuned, draft), indent=1)
    out.write_text(config + "\n", encoding="utf-8")
    notes.print(f'written to {out}; "tree_by_batch_size": "auto" reads {kept}')


def _settings(target: str, draft: str, encoded: list, sampling, depth: int | list[int]) -> dict:
    """What a file of results was measured with."""
    return {
        "target": target,
        "draft": draft,
        "prompts": len(encoded),
        "texts": sampling.texts,
        "tokens": sampling.tokens,
        "roots_per_text": sampling.roots,
        "depth": depth,
        "seed": sampling.seed,
    }


def _rounded(rates: dict) -> dict:
    return {
        str(rule): {
            t: {str(k): [round(rate, 4) for rate in by_slot] for k, by_slot in table.items()}
            for t, table in by_temperature.items()
        }
        for rule, by_temperature in rates.items()
    }


@contextmanager
def _usage_errors() -> Iterator[None]:
    """Bad values and missing folders are the caller's: one line, no traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        notes.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error


@contextmanager
def _progress() -> Iterator:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("prompts"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=notes) as bars:
        tasks: dict[str, int] = {}

        def advance(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done)

        yield advance


def _variants(rules: list[str]) -> list:
    from vllm_spechub.offline.simulation.drafts import Variant
    from vllm_spechub.triton_kernels.rules import RULES, check_rule

    variants = [Variant.parse(text) for text in rules or RULES]
    for variant in variants:
        check_rule(variant.rule, variant.sharpening, 1)
    return list(dict.fromkeys(variants))


def _check_nodes(nodes: list[int]) -> None:
    from vllm_spechub.trees.tree import MAX_NODES

    for count in nodes:
        if not 2 <= count <= MAX_NODES:
            raise ValueError(f"--nodes must be in 2..{MAX_NODES}, got {count}")


def _load(target, draft, prompts, limit, texts, tokens, seed, depth, device, dtype):
    from vllm_spechub.offline.simulation.load import load
    from vllm_spechub.offline.simulation.study import Sampling

    sampling = Sampling(texts=texts, tokens=tokens, roots=4, seed=seed)
    return *load(target, draft, prompts, limit, sampling, depth, device, dtype), sampling
