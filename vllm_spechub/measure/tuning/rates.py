# SPDX-License-Identifier: Apache-2.0
"""Acceptance by slot of every rule on the user's prompts, measured with transformers."""

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from vllm_spechub.triton_kernels.rules import rates_of

REFERENCE_NODES, REFERENCE_DEPTH = 15, 5
"""The size of the tree by which rules are compared, each on its own best shape."""
PREFERENCE = 0.01
"""The default rule stays unless another emits this much more."""


@dataclass(frozen=True)
class Study:
    """What is measured, and on what."""

    target: str
    draft: str
    prompts: Path
    limit: int | None
    rules: tuple[str, ...]
    temperature: float
    texts: int
    tokens: int


Found = tuple[dict[str, dict[str, list[float]]], dict[str, float]]
"""Rates by rule, number of children and slot; and by rule the simulated tokens per step."""


def measure(study: Study, progress: Callable[[str, int, int], None]) -> Found:
    """Rates and simulated tokens per step, in a process that leaves no models behind.

    Args:
        study: what to measure.
        progress: told what is measured, how many prompts are done, and how many there are.

    Raises:
        ValueError: the models do not fit together, or the prompts are not as they should be.
        RuntimeError: the process stopped; its error is on the standard error.
    """
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_in_process, args=(theirs, study), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            kind, content = ours.recv()
            if kind == "progress":
                progress(*content)
            elif kind == "error":
                raise ValueError(content)
            else:
                return content
    except EOFError:
        raise RuntimeError("measuring acceptance stopped; its error is above") from None
    finally:
        process.terminate()
        process.join()


def _in_process(connection: Connection, study: Study) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process ends this one
    try:
        found = _measure(study, lambda *done: connection.send(("progress", done)))
    except (ValueError, OSError) as error:
        connection.send(("error", str(error)))
    else:
        connection.send(("found", found))


def _measure(study: Study, progress: Callable[[str, int, int], None]) -> Found:
    import torch

    from vllm_spechub.offline.simulation.drafts import Variant
    from vllm_spechub.offline.simulation.load import load
    from vllm_spechub.offline.simulation.study import Sampling, measure_rates, pick_tree
    from vllm_spechub.trees.best_tree import best_shape

    sampling = Sampling(texts=study.texts, tokens=study.tokens)
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    models = study.target, study.draft, study.prompts, study.limit
    pair, prompts = load(*models, sampling, REFERENCE_DEPTH, None, dtype)
    variants = [
        Variant(rule) for rule in dict.fromkeys([*study.rules, *map(rates_of, study.rules)])
    ]
    rates = measure_rates(
        pair, prompts, variants, study.temperature, sampling, REFERENCE_DEPTH, progress
    )
    simulated = {}
    for rule in study.rules:
        guides = dict.fromkeys([rule, rates_of(rule)])
        trees = [
            best_shape(rates[Variant(guide)], REFERENCE_NODES, REFERENCE_DEPTH).tree
            for guide in guides
        ]
        _, simulated[rule] = pick_tree(
            pair, prompts, Variant(rule), trees, [study.temperature], sampling, progress
        )
    return {
        str(variant): {str(k): list(slots) for k, slots in table.items()}
        for variant, table in rates.items()
    }, simulated


def best_rule(simulated: dict[str, float], default: str) -> str:
    """The rule that emits the most; the default one where it is as good."""
    best = max(simulated, key=simulated.get)
    if default in simulated and simulated[best] <= (1 + PREFERENCE) * simulated[default]:
        return default
    return best


def guide_rates(rates: dict[str, dict[str, Sequence[float]]], rule: str) -> dict[int, list[float]]:
    """The rates that a rule's shapes are made of."""
    return {int(k): list(slots) for k, slots in rates[rates_of(rule)].items()}
