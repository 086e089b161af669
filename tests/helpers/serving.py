# SPDX-License-Identifier: Apache-2.0
"""A server in processes of its own."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_SECONDS = 180


def fetch(url: Any, timeout: float = 10) -> str:
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        return answer.read().decode()


@contextmanager
def serving(command: list, log: Path, **variables: str) -> Iterator[str]:
    """Within, a server listens at the address; its whole process group is gone afterwards.

    Args:
        command: starts it; host and port are added.
        log: where it writes.
        variables: of its environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    for_tests = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL")
    env = {k: v for k, v in os.environ.items() if k not in for_tests} | variables
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
    try:
        give_up = time.monotonic() + START_SECONDS
        while True:
            try:
                fetch(f"{address}/health")
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < give_up, log.read_text()[-4000:]
                time.sleep(0.3)
        yield address
        assert process.poll() is None, log.read_text()[-4000:]
    finally:
        for signum in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, signum)
                process.wait(30)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
