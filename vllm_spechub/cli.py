# SPDX-License-Identifier: Apache-2.0
"""`vllm-spechub`: choose a verification rule and a tree for a pair of models.

Every command first checks everything that it will need. It imports most of the package only when it
runs, so that `--help` stays fast.
"""

import io
import json
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"vllm-spechub needs {error.name}: pip install 'vllm-spechub[cli]'") from None

from vllm_spechub.measure import preflight
from vllm_spechub.measure.terminal import one_line_errors, progress_bar, prompt_counter
from vllm_spechub.registry import RULES
from vllm_spechub.trees.tree import MAX_NODES
from vllm_spechub.triton_kernels.rules import DEFAULT_RULE, rates_of

if TYPE_CHECKING:
    import torch

    from vllm_spechub.drafts.sources import Sources
    from vllm_spechub.offline.simulation.drafts import Variant
    from vllm_spechub.offline.simulation.study import Sampling
    from vllm_spechub.offline.simulation.texts import ModelPair
    from vllm_spechub.trees.best_tree import Rates
    from vllm_spechub.trees.level_tree import LevelTree
    from vllm_spechub.trees.tree import TokenTree

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Lossless speculative decoding with draft trees: compare rules, choose trees, show steps.",
)
# Results go to standard output, everything else to standard error.
output, notes = Console(), Console(stderr=True)

MAX_DEPTH = 16
PLOT_MODULE = "matplotlib.pyplot"

# Options that several commands share
Target = Annotated[str, typer.Argument(help="The target model: a folder or a Hugging Face name.")]
Draft = Annotated[
    str, typer.Argument(help="The draft model, with the target's tokenizer, or an EAGLE head.")
]
DraftOption = Annotated[
    str,
    typer.Option(help="The draft model, a head, or for its own MTP layer the target once more."),
]
Prompts = Annotated[
    Path,
    typer.Option(
        help="Prompts: JSON lines with `turns` or `prompt`, or text with one prompt per line.",
        exists=True,
        dir_okay=False,
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only this many prompts.")]
Temperature = Annotated[
    float, typer.Option("--temperature", "-T", min=0.0, help="The sampling temperature.")
]
Temperatures = Annotated[
    list[float],
    typer.Option("--temperature", "-T", min=0.0, help="A sampling temperature; repeatable."),
]
Texts = Annotated[int, typer.Option(min=1, help="Texts to sample from the target per prompt.")]
Tokens = Annotated[int, typer.Option(min=4, help="Tokens per text.")]
Seed = Annotated[
    int, typer.Option(min=0, max=2**32 - 1, help="The same seed gives the same results.")
]
Device = Annotated[
    str | None,
    typer.Option(help="The PyTorch device.", show_default="CUDA if available, else the CPU"),
]
LoadedAs = Annotated[
    str,
    typer.Option(
        help="Those options of your engine that say where models come from, as JSON: tokenizer, "
        "revision, trust_remote_code and the like."
    ),
]
Dtype = Annotated[
    str, typer.Option(help="The data type of both models: float32, bfloat16 or float16.")
]


@app.command()
def simulate(
    target: Target,
    draft: Draft,
    prompts: Prompts,
    limit: Limit = None,
    temperature: Temperatures = [0.3, 0.6, 1.0],
    rule: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            "-r",
            help="A rule, or RULE@SHARPENING; repeatable.",
            show_default="all rules",
        ),
    ] = None,
    nodes: Annotated[
        list[int],
        typer.Option(
            "--nodes",
            "-n",
            min=2,
            max=MAX_NODES,
            help="The largest number of drafted nodes; repeatable.",
        ),
    ] = [6, 14, 30],
    depth: Annotated[
        list[int],
        typer.Option(
            "--depth",
            "-d",
            min=1,
            max=MAX_DEPTH,
            help="The largest depth of the best trees; repeatable.",
        ),
    ] = [5],
    texts: Texts = 40,
    tokens: Tokens = 48,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="A folder for CSV files, JSON and a plot.")
    ] = None,
    small: Annotated[
        bool,
        typer.Option(
            "--small", help="Also compare acceptance with the optimum, on vocabularies of 8 tokens."
        ),
    ] = False,
    engine: LoadedAs = "{}",
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Compare the tokens per step of all rules, on complete trees and on each rule's best tree.

    The target samples texts, and trees are drafted at several places of each text, all of which
    count equally. The tokens that verification emits on average are computed exactly for each
    drafted tree, without sampling.
    """
    with one_line_errors(notes):
        preflight.check_modules("transformers", "scipy.stats")
        if out is not None:
            preflight.check_modules(PLOT_MODULE)
            preflight.check_output_folder("--out", out)
        sources = _sources(target, draft, engine)
        preflight.check_pair(sources, "DRAFT")
        variants = _parse_rules(rule)
        from vllm_spechub.offline.simulation import report, study, yardstick

        sampling = _sampling(texts, tokens, seed)
        pair, encoded = _load(sources, prompts, limit, sampling, max(depth), device, dtype)
        with progress_bar(notes, "prompts") as bar:
            found = study.run_study(
                pair,
                encoded,
                variants,
                temperature,
                nodes,
                depth,
                sampling,
                prompt_counter(bar),
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
            settings = _settings(sources, encoded, sampling, depth) | {"dtype": dtype}
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
    temperature: Temperatures = [1.0],
    nodes: Annotated[
        int,
        typer.Option(
            "--nodes", "-n", min=1, max=MAX_NODES, help="The largest number of drafted nodes."
        ),
    ] = 15,
    depth: Annotated[
        int,
        typer.Option("--depth", "-d", min=1, max=MAX_DEPTH, help="The largest depth of the tree."),
    ] = 5,
    levels: Annotated[
        bool,
        typer.Option(
            "--levels",
            help="Choose widths of levels, which each step makes a tree of, and keep them for "
            '"tree": "levels:auto:NODES:DEPTH".',
        ),
    ] = False,
    step_cost: Annotated[
        list[str] | None,
        typer.Option(
            help="ROWS=COST: a step's duration with so many rows per request, which are the root "
            "and the nodes; repeatable, linear in between.",
            show_default="nodes cost nothing",
        ),
    ] = None,
    level_cost: Annotated[
        float,
        typer.Option(min=0.0, help="The duration of drafting one level, in the unit of COST."),
    ] = 0.0,
    texts: Texts = 10,
    tokens: Tokens = 48,
    seed: Seed = 0,
    rates_file: Annotated[
        Path | None,
        typer.Option(
            "--rates",
            help="Also write the acceptance rates of all rules by temperature to this JSON file.",
        ),
    ] = None,
    engine: LoadedAs = "{}",
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Print the best tree for a pair of models, as JSON for the option "tree".

    The command measures how often the child in each slot is accepted, averaged over the
    temperatures, finds the tree that emits the most tokens per step at these rates, or per unit of
    time at the costs that you give, and simulates it on new texts. With --levels it simulates
    several widths of levels, and prints the best.
    """
    with one_line_errors(notes):
        preflight.check_modules("transformers")
        step_cost_of = preflight.parse_costs("--step-cost", step_cost or ["1=1"])
        if rates_file is not None:
            preflight.check_output_file("--rates", rates_file)
        sources = _sources(target, draft, engine)
        preflight.check_pair(sources, "DRAFT")
        (variant,) = _parse_rules([rule])
        others = _parse_rules(None) if rates_file else []
        from vllm_spechub.offline.simulation import study
        from vllm_spechub.offline.simulation.drafts import Variant
        from vllm_spechub.rules.base import check_rule
        from vllm_spechub.trees.best_tree import average_rates, fastest_shape
        from vllm_spechub.trees.level_tree import LevelTree, width_candidates

        def duration(tree: "TokenTree | LevelTree") -> float:
            return step_cost_of(1 + tree.num_nodes) + level_cost * tree.depth

        store = None
        if levels:
            check_rule(variant.rule, variant.sharpening, width_candidates(nodes, depth))
            store = _measured()
            if store is not None:
                preflight.check_output_folder("VLLM_CACHE_ROOT:", store.folder())
        sampling = _sampling(texts, tokens, seed)
        pair, encoded = _load(sources, prompts, limit, sampling, depth, device, dtype)
        with progress_bar(notes, "prompts") as bar:
            advance = prompt_counter(bar)
            # Build a tree from the rule's own rates and one from the rates that it should use
            # instead; the simulation decides between them.
            rated = [variant, Variant(rates_of(variant.rule), variant.sharpening)]
            measured = list(dict.fromkeys([*rated, *others]))
            rates = {
                f"{t:g}": study.measure_rates(pair, encoded, measured, t, sampling, depth, advance)
                for t in temperature
            }
            average = {v: average_rates([table[v] for table in rates.values()]) for v in rated}
            trees = [
                fastest_shape(by_slot, nodes, depth, step_cost_of, level_cost).tree
                for by_slot in average.values()
            ]
            tree, tokens_per_step = study.pick_tree(
                pair,
                encoded,
                variant,
                width_candidates(nodes, depth, trees) if levels else trees,
                temperature,
                sampling,
                advance,
                duration,
            )
        if store is not None and isinstance(tree, LevelTree):
            store.keep_widths(target, draft, variant.rule, nodes, depth, tree)
            notes.print(f'"levels:auto:{nodes}:{depth}" stands for these widths here')
        if rates_file is not None:
            settings = _settings(sources, encoded, sampling, depth)
            record = {"settings": settings, "rates": _rounded(rates)}
            rates_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    notes.print(_slot_table(f"{variant}: acceptance by slot", temperature, average[variant]))
    notes.print(
        f"{tree.num_nodes} nodes, depth {tree.depth}, {tokens_per_step:.2f} tokens per step"
    )
    print(json.dumps(str(tree) if isinstance(tree, LevelTree) else list(tree.parents)))


@app.command()
def explain(
    target: Target,
    draft: Draft,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    tree: Annotated[
        str,
        typer.Option(
            help="The tree, as for `tree` in --speculative-config, or parents as a JSON list."
        ),
    ] = "binary:3",
    rule: Annotated[str, typer.Option("--rule", "-r", help="The verification rule.")] = (
        DEFAULT_RULE
    ),
    temperature: Annotated[
        float, typer.Option("--temperature", "-T", min=0.01, help="The sampling temperature.")
    ] = 1.0,
    steps: Annotated[int, typer.Option(min=1, help="Steps to decode.")] = 3,
    seed: Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Write a picture to FILE.png or FILE.html instead of printing text."),
    ] = None,
    engine: LoadedAs = "{}",
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Show the tree of each step for one prompt.

    The command shows the drafted tokens, their probabilities, which of them were accepted, and
    where verification ended. q is the probability that the draft gives a token after the path to
    its parent, and p the target's.
    """
    with one_line_errors(notes):
        preflight.check_modules("transformers")
        if out is not None:
            _check_picture(out)
        sources = _sources(target, draft, engine)
        preflight.check_pair(sources, "DRAFT")
        preflight.check_text("--prompt", prompt)
        if rule not in RULES:
            raise ValueError(f"--rule is {rule!r}, allowed: {', '.join(RULES)}")
        from vllm_spechub.offline import explain
        from vllm_spechub.offline.simulation.load import placement
        from vllm_spechub.offline.simulation.texts import PairDescription
        from vllm_spechub.rules.base import check_rule
        from vllm_spechub.trees.best_tree import parse_tree

        store = _measured()
        measured = partial(store.measured_widths, target, draft, rule) if store else None
        parsed = parse_tree(_read_tree(tree), rule, measured)
        check_rule(rule, 1.0, [parsed])
        where = placement(device, dtype)
        description = PairDescription.read(sources)
        limit = description.max_positions
        explain.check_length(len(description.encode(prompt, limit)), parsed, steps, description)
        pair = description.load(*where)
        encoded = pair.encode(prompt, limit)
        trace = explain.trace(pair, encoded, parsed, rule, temperature, steps, seed)
        if out is None:
            explain.render(trace, output)
            return
        if out.suffix == ".png":
            explain.save_picture(trace, out)
        else:
            page = Console(record=True, file=io.StringIO(), width=120)
            explain.render(trace, page)
            page.save_html(str(out))
        notes.print(f"written to {out}")


@app.command()
def tune(
    target: Target,
    draft: DraftOption,
    prompts: Prompts,
    limit: Limit = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            "-r",
            help="A rule to choose from; repeatable.",
            show_default="all that draft trees, but match; for an MTP layer, traversal",
        ),
    ] = None,
    temperature: Temperature = 1.0,
    nodes: Annotated[
        list[int],
        typer.Option(
            "--nodes",
            "-n",
            min=1,
            max=MAX_NODES,
            help="A number of drafted nodes to try; repeatable.",
        ),
    ] = [1, 2, 4, 8, 16, 32],
    chain: Annotated[
        list[int],
        typer.Option("--chain", "-K", min=1, help="A length of vLLM's chain to try; repeatable."),
    ] = [1, 2, 4, 8],
    batch: Annotated[
        list[int],
        typer.Option(
            "--batch", "-b", min=1, help="A number of running requests to try; repeatable."
        ),
    ] = [1, 2, 4, 8, 16, 32, 64],
    draft_layers: Annotated[
        str | None,
        typer.Option(
            help="Numbers of the draft's first layers to choose from, such as 3,6,12.",
            show_default="all layers",
        ),
    ] = None,
    levels: Annotated[
        bool,
        typer.Option(
            "--levels", help="Also try widths of levels, with the nodes and depth of each tree."
        ),
    ] = False,
    texts: Texts = 10,
    tokens: Annotated[int, typer.Option(min=4, help="Tokens per text and per request.")] = 64,
    repetitions: Annotated[int, typer.Option(min=1, help="Repetitions per measurement.")] = 3,
    resident: Annotated[
        int | None,
        typer.Option(
            min=1, help="Engines that run at once.", show_default="all on the CPU, else 3"
        ),
    ] = None,
    engine: Annotated[str, typer.Option(help="The options of your engine, as JSON.")] = "{}",
    out: Annotated[Path, typer.Option(help="The JSON file to write, FILE.json.")] = Path(
        "spechub-tuned.json"
    ),
) -> None:
    """Find the best tree for each number of running requests, on this machine and your prompts.

    The command writes a JSON file for --speculative-config, a plot, a CSV file and a state file.
    You can interrupt it at any time: the same command continues where it stopped.
    """
    with one_line_errors(notes):
        preflight.check_modules("transformers", PLOT_MODULE)
        if out.suffix != ".json":
            raise ValueError(f"--out must end in .json, got {out.name!r}")
        for suffix in (".json", ".csv", ".png"):
            preflight.check_output_file("--out", out.with_suffix(suffix))
        from vllm_spechub.drafts.kinds import MODEL
        from vllm_spechub.drafts.sources import Sources
        from vllm_spechub.measure.benchmark.methods import proposer_of
        from vllm_spechub.offline.heads import needs_engine

        sources = Sources(target, draft, preflight.parse_engine_options("--engine", engine))
        preflight.check_pair(sources, "--draft", in_engines=True)
        proposer = proposer_of(sources)
        depths = preflight.parse_layers("--draft-layers", draft_layers, sources, proposer != MODEL)
        rules = _parse_tree_rules(rule, levels)
        if len(rules) > 1 and needs_engine(sources):
            if rule is not None:
                raise ValueError(
                    "--rule: a head that runs in engines only is measured with one rule; name one, "
                    "or none"
                )
            rules = (DEFAULT_RULE,)
        from vllm_spechub.measure.benchmark.machine import provenance
        from vllm_spechub.measure.benchmark.report import write_csv
        from vllm_spechub.measure.tuning import report
        from vllm_spechub.measure.tuning.request import TuningRequest
        from vllm_spechub.measure.tuning.run import Tuning
        from vllm_spechub.measure.tuning.state import State
        from vllm_spechub.trees import measured_schedule
        from vllm_spechub.trees.level_tree import LevelTree

        preflight.check_output_folder("VLLM_CACHE_ROOT:", measured_schedule.folder())
        about = provenance()
        results = []
        for layers in depths:
            request = TuningRequest(
                sources,
                prompts,
                limit,
                rules,
                temperature,
                _ascending(nodes),
                _ascending(chain),
                _ascending(batch),
                texts,
                tokens,
                repetitions,
                layers,
                levels,
            )
            suffix = ".state.json" if layers is None else f".state-{layers}.json"
            state = State.load(out.with_suffix(suffix), request.settings)
            try:
                tuned = Tuning(request, state, resident, notes).run()
            except KeyboardInterrupt:
                notes.print(f"stopped; the same command continues from {state.path}")
                raise typer.Exit(130) from None
            if layers is not None:
                output.print(f"{layers} layers: {tuned.mean_gain:.2f} times plain vLLM on average")
            results.append((tuned, state, request))
        tuned, state, request = max(results, key=lambda result: result[0].mean_gain)
        own = request.proposer_options
        output.print(report.table(tuned))
        write_csv(list(state.rows.values()), out.with_suffix(".csv"), about)
        for each, _, of_depth in results:
            measured_schedule.keep(
                target, draft, proposer, each.rule, each.schedule, of_depth.proposer_options
            )
            for tree in each.trees.values():
                if isinstance(tree, LevelTree):
                    measured_schedule.keep_widths(
                        target,
                        draft,
                        each.rule,
                        tree.num_nodes,
                        tree.depth,
                        tree,
                        of_depth.proposer_options,
                    )
        if request.draft_layers is not None:
            measured_schedule.keep_layers(target, draft, request.draft_layers)
        if tuned.speculates:
            config = json.dumps(report.speculative_config(tuned, draft, own), indent=1)
            out.write_text(config + "\n", encoding="utf-8")
            kept = measured_schedule.folder()
            notes.print(f'written to {out}; "tree_by_batch_size": "auto" reads it from {kept}')
        else:
            notes.print("no tree was faster than plain vLLM here: leave speculation off")
        report.plot(tuned, out.with_suffix(".png"))


@app.command()
def doctor(
    full: Annotated[
        bool, typer.Option("--full", help="Also time the kernels at the sizes of real models.")
    ] = False,
) -> None:
    """Check kernels, CUDA graphs, memory and versions on this machine, in about a minute.

    Every kernel runs against its reference on this device, odd rows included, and a tiny pair of
    models runs in real engines. The exit status is 1 if anything is at fault.
    """
    with one_line_errors(notes):
        preflight.check_modules("transformers", "vllm")
        from vllm_spechub.measure.doctor.examination import examine
        from vllm_spechub.measure.doctor.finding import FAULT, OK, WARNING

        colors = {OK: "green", WARNING: "yellow", FAULT: "red"}
        faults = 0
        for finding in examine(full):
            faults += finding.outcome == FAULT
            line = f"[{colors[finding.outcome]}]{finding.outcome:>7}[/]  "
            output.print(line + escape(f"{finding.what}: {finding.found}"), highlight=False)
            if finding.remedy:
                output.print(f"         -> {escape(finding.remedy)}", highlight=False)
        if faults:
            notes.print(f"{faults} at fault", style="red")
            raise typer.Exit(1)


def _measured() -> ModuleType | None:
    """The store of measurements that engines read; None without vLLM, whose cache holds it."""
    if find_spec("vllm") is None:
        return None
    from vllm_spechub.trees import measured_schedule

    return measured_schedule


def _parse_rules(texts: Sequence[str] | None) -> "list[Variant]":
    """Parse `RULE` or `RULE@SHARPENING`; without any, take all registered rules."""
    from vllm_spechub.offline.simulation.drafts import Variant
    from vllm_spechub.rules.base import check_rule

    try:
        variants = [Variant.parse(text) for text in texts or RULES]
        for variant in variants:
            check_rule(variant.rule, variant.sharpening)
    except ValueError as error:
        raise ValueError(f"--rule: {error}") from None
    return list(dict.fromkeys(variants))


def _parse_tree_rules(texts: Sequence[str] | None, levels: bool = False) -> tuple[str, ...]:
    """The names of rules that draft trees, and with `levels` trees by level widths, too.

    Without any, all of them but those that read the target's own draws: these are for the text that
    they give, and others emit more tokens where anything is sampled.
    """
    allowed = [name for name in RULES if name != "chain" and (not levels or _follows_levels(name))]
    for name in texts or ():
        if name not in allowed:
            raise ValueError(f"--rule is {name!r}, allowed: {', '.join(allowed)}")
    if texts:
        return tuple(dict.fromkeys(texts))
    return tuple(name for name in allowed if not RULES.load(name).reads_draws)


def _read_tree(text: str) -> Any:
    """A list from JSON; whatever else it is, `parse_tree` knows it or says what is allowed."""
    try:
        return json.loads(text) if text.startswith("[") else text
    except (ValueError, RecursionError):
        return text


def _follows_levels(rule: str) -> bool:
    from vllm_spechub.rules.base import check_rule
    from vllm_spechub.trees.level_tree import LevelTree

    try:
        check_rule(rule, 1.0, [LevelTree((2,))])
    except ValueError:
        return False
    return True


def _check_picture(out: Path) -> None:
    if out.suffix not in (".png", ".html"):
        raise ValueError(f"--out must end in .png or .html, got {out.name!r}")
    preflight.check_output_file("--out", out)
    if out.suffix == ".png":
        preflight.check_modules(PLOT_MODULE)


def _ascending(numbers: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(set(numbers)))


def _sampling(texts: int, tokens: int, seed: int) -> "Sampling":
    from vllm_spechub.offline.simulation.study import Sampling

    return Sampling(texts=texts, tokens=tokens, roots=4, seed=seed)


def _sources(target: str, draft: str, engine: str) -> "Sources":
    from vllm_spechub.drafts.sources import Sources

    return Sources(target, draft, preflight.parse_source_options("--engine", engine))


def _load(
    sources: "Sources",
    prompts: Path,
    limit: int | None,
    sampling: "Sampling",
    depth: int,
    device: str | None,
    dtype: str,
) -> "tuple[ModelPair, list[torch.Tensor]]":
    from vllm_spechub.offline.simulation.load import load

    return load(sources, prompts, limit, sampling, depth, device, dtype)


def _settings(
    sources: "Sources",
    encoded: "Sequence[torch.Tensor]",
    sampling: "Sampling",
    depth: int | list[int],
) -> dict[str, Any]:
    """The settings of a measurement, for its JSON file."""
    return vars(sources) | {
        "prompts": len(encoded),
        "texts": sampling.texts,
        "tokens": sampling.tokens,
        "roots_per_text": sampling.roots,
        "depth": depth,
        "seed": sampling.seed,
    }


def _rounded(rates: "Mapping[str, Mapping[Variant, Rates]]") -> dict[str, Any]:
    """Convert rates by temperature and rule for a JSON file: by rule, temperature, children."""
    by_rule: dict[str, Any] = {}
    for temperature, by_variant in rates.items():
        for variant, by_slot in by_variant.items():
            by_rule.setdefault(str(variant), {})[temperature] = {
                str(k): [round(rate, 4) for rate in slots] for k, slots in by_slot.items()
            }
    return by_rule


def _slot_table(title: str, temperatures: Sequence[float], rates: "Rates") -> Table:
    table = Table(title=f"{title}, T = {', '.join(map(str, temperatures))}")
    for column in ("children", "slot 1", "slot 2", "slot 3", "slot 4"):
        table.add_column(column, justify="right")
    for k, slots in rates.items():
        table.add_row(str(k), *(f"{rate:.3f}" for rate in slots))
    return table
