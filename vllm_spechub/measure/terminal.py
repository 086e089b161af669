# SPDX-License-Identifier: Apache-2.0
"""What commands show in the terminal: one-line errors and progress bars."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from vllm_spechub.measure.benchmark.engine import EngineFailed


@contextmanager
def one_line_errors(console: Console) -> Iterator[None]:
    """Exit with one line instead of a traceback.

    A bad value or a missing file exits with status 2. An engine that failed exits with status 1,
    after the end of its log, and so does a process that was killed.
    """
    try:
        yield
    except EngineFailed as failure:
        console.print(str(failure), markup=False, highlight=False)
        console.print("error: an engine stopped; its last lines are above", style="red")
        raise typer.Exit(1) from failure
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())
        console.print(f"error: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1 if isinstance(error, ChildProcessError) else 2) from error


@contextmanager
def progress_bar(console: Console, unit: str = "") -> Iterator[Progress]:
    """A bar with counts and the remaining time for each task that is added to it."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        *([TextColumn(unit)] if unit else []),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield progress


def prompt_counter(progress: Progress) -> Callable[[str, int, int], None]:
    """A function that shows, for each label, how many of how many prompts are done."""
    tasks: dict[str, TaskID] = {}

    def advance(label: str, done: int, total: int) -> None:
        if label not in tasks:
            tasks[label] = progress.add_task(label, total=total)
        progress.update(tasks[label], completed=done)

    return advance
