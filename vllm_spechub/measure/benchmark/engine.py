# SPDX-License-Identifier: Apache-2.0
"""An engine in a process of its own, so that several can be up at once and one may fail alone."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LAST_LINES = 30
GOODBYE_SECONDS = 30


class EngineFailed(RuntimeError):
    """An engine did not start, or stopped; its text is the end of its log."""


class EngineProcess:
    """One `LLM`, started at once and request to run functions.

    Args:
        options: arguments of `vllm.LLM`. A draft-model chain gets the correction that it needs on
            the CPU (`fixed_chain`).
        log: where the engine's output goes.
    """

    def __init__(self, options: dict[str, Any], log: Path) -> None:
        # vLLM is imported once; its own processes are started as vLLM starts them.
        import vllm.entrypoints.llm  # noqa: F401

        fork = multiprocessing.get_context("fork")
        self.log = log
        self._connection, theirs = fork.Pipe()
        self._process = fork.Process(target=_serve, args=(theirs, self._connection, options, log))
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Of the process, and of the group of all that it started."""
        return self._process.pid

    def wait(self) -> None:
        """Until it is up.

        Raises:
            EngineFailed: it did not start.
        """
        self._receive()

    def call(self, function: Callable, *arguments: Any) -> Any:
        """`function(llm, *arguments)`, run in the engine's process; a module's function.

        Raises:
            EngineFailed: the engine stopped.
        """
        try:
            self._connection.send((function, arguments))
        except BrokenPipeError:
            raise EngineFailed(self._last_words()) from None
        return self._receive()

    def ask_to_stop(self) -> None:
        with suppress(BrokenPipeError):  # it has stopped
            self._connection.send(None)
        self._connection.close()

    def join(self) -> None:
        """Wait for the end, and end what is left of it by force."""
        self._process.join(GOODBYE_SECONDS)
        if self._process.exitcode != 0:
            with suppress(ProcessLookupError):  # all of them have ended
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
    """Stop engines and everything that they started."""
    engines = list(engines)
    for engine in engines:
        engine.ask_to_stop()
    for engine in engines:
        engine.join()


def _serve(theirs: Connection, ours: Connection, options: dict[str, Any], log: Path) -> None:
    """The process: start the engine, say so, then run what is sent, until None is."""
    ours.close()  # or the end of the other process would not be noticed
    os.setsid()  # an interrupt from the keyboard is for the other process, which will say so
    # Finding out about the machine for vLLM's usage statistics takes seconds beside a start.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    output = log.open("w", buffering=1)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    from vllm import LLM
    from vllm.platforms import current_platform

    is_chain = (options.get("speculative_config") or {}).get("method") == "draft_model"
    extension = "worker.Observed"
    if current_platform.is_cpu():
        if is_chain:
            extension = "fixed_chain.FixedChain"
        # What vLLM 0.32 compiles ahead of time here, it cannot load again ("no attribute
        # 'finalize_loading'"), so every start would compile. Inductor's own cache does load.
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    llm = LLM(**options, worker_extension_cls=f"vllm_spechub.measure.benchmark.{extension}")
    theirs.send(None)
    try:
        for function, arguments in iter(theirs.recv, None):
            theirs.send(function(llm, *arguments))
    except (EOFError, BrokenPipeError):
        pass  # the other process has ended
    # At once, since vLLM would wait while its processes take themselves apart. Python's resource
    # tracker, which outlives this process, frees their shared memory.
    llm.llm_engine.engine_core.shutdown(timeout=0)
