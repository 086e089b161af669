# SPDX-License-Identifier: Apache-2.0
"""An engine in its own process, so that several can run at the same time, and one can fail alone.

`ProcessPoolExecutor` cannot do this job: it does not end its worker when the process that started
it is killed, and it cannot kill what is left of an engine's process group after a time limit.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from weakref import WeakSet

LAST_LINES = 30
OURS: "WeakSet[Connection]" = WeakSet()
"""This process's ends of the pipes to its engines."""
GOODBYE_SECONDS = 30


class EngineFailed(RuntimeError):
    """An engine did not start or stopped early. The message is the end of its log."""


class EngineProcess:
    """An `LLM` in its own process, which starts immediately and then runs functions on request.

    Args:
        options: arguments of `vllm.LLM`. On the CPU, vLLM's own chain also gets the correction
            that it needs (`fixed_chain`).
        log: file for the engine's output.
    """

    def __init__(self, options: dict[str, Any], log: Path) -> None:
        # Import vLLM before the fork, so that it is imported only once for all engines.
        import vllm.entrypoints.llm  # noqa: F401

        fork = multiprocessing.get_context("fork")
        self.log = log
        self._connection, theirs = fork.Pipe()
        OURS.add(self._connection)
        self._process = fork.Process(target=_serve, args=(theirs, options, log))
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """The process's id, which is also that of the group of all processes it started."""
        assert self._process.pid is not None  # it was started
        return self._process.pid

    def wait(self) -> None:
        """Wait until the engine is up.

        Raises:
            EngineFailed: it did not start.
        """
        self._receive()

    def call(self, function: Callable, *arguments: Any) -> Any:
        """Run `function(llm, *arguments)` in the engine's process and return its result.

        The function must be defined at the top level of a module.

        Raises:
            EngineFailed: the engine stopped.
        """
        try:
            self._connection.send((function, arguments))
        except BrokenPipeError:
            raise EngineFailed(self._last_words()) from None
        return self._receive()

    def ask_to_stop(self) -> None:
        """Tell the engine to shut down, without waiting for it."""
        with suppress(BrokenPipeError):  # it has already stopped
            self._connection.send(None)
        self._connection.close()

    def join(self) -> None:
        """Wait for the process to end, and kill what is left of its group after a time limit."""
        self._process.join(GOODBYE_SECONDS)
        if self._process.exitcode != 0:
            with suppress(ProcessLookupError):  # no process is left
                os.killpg(self.pid, signal.SIGKILL)
            self._process.join()

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise EngineFailed(self._last_words()) from None

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-LAST_LINES:])


def close_all(engines: Iterable[EngineProcess]) -> None:
    """Stop the engines and all processes that they started."""
    engines = list(engines)
    for engine in engines:
        engine.ask_to_stop()
    for engine in engines:
        engine.join()


def _serve(theirs: Connection, options: dict[str, Any], log: Path) -> None:
    """Start the engine, report that it is up, then run the functions received until None comes."""
    for ours in OURS:  # otherwise neither this engine nor earlier ones notice when the process ends
        ours.close()
    os.setsid()  # Ctrl-C goes only to the other process, which then stops this one
    # Collecting vLLM's usage statistics adds seconds to the start.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    output = log.open("w", buffering=1)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    from vllm import LLM
    from vllm.platforms import current_platform

    is_chain = (options.get("speculative_config") or {}).get("method") not in (None, "spechub")
    extension = "worker.Observed"
    if current_platform.is_cpu():
        if is_chain:
            extension = "fixed_chain.FixedChain"
        # vLLM 0.32 cannot load what it compiled ahead of time here ("no attribute
        # 'finalize_loading'"), so each start would compile again. Inductor's own cache works.
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    llm = LLM(**options, worker_extension_cls=f"vllm_spechub.measure.benchmark.{extension}")
    theirs.send(None)
    try:
        for function, arguments in iter(theirs.recv, None):
            theirs.send(function(llm, *arguments))
    except (EOFError, BrokenPipeError):
        pass  # the other process has ended
    # Without a timeout, vLLM would wait for its processes to clean up. Python's resource tracker,
    # which outlives this process, frees their shared memory.
    llm.llm_engine.engine_core.shutdown(timeout=0)
