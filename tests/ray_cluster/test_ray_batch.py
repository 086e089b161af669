# SPDX-License-Identifier: Apache-2.0
"""Offline batches on a local Ray cluster: every row once, whatever is killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from helpers.pair import DRAFT, SCRIPTS, TARGET
from helpers.without_ray import ENGINE, without_ray

psutil = pytest.importorskip("psutil")

MAX_TOKENS = 40
SECONDS = 800  # on a busy machine Ray and its engines start slowly
pytestmark = pytest.mark.timeout(3 * SECONDS)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A file of rows, and its prompts by id."""
    lines = (SCRIPTS / "demo_pair" / "prompts.jsonl").read_text().splitlines()
    texts = [json.loads(line)["turns"][0] for line in lines]
    rows = {i: texts[i % len(texts)][: 200 - i % 40] for i in range(300)}
    path = tmp_path_factory.mktemp("rows") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": i, "prompt": p}) + "\n" for i, p in rows.items()))
    return path, rows


@pytest.fixture(scope="module")
def single_engine(prompts):
    """What one engine without trees answers."""
    rows = prompts[1]
    params = [{"temperature": 0, "max_tokens": MAX_TOKENS}] * len(rows)
    return dict(zip(rows, without_ray(list(rows.values()), params), strict=True))


def start(cluster, prompts, out) -> subprocess.Popen:
    command = [sys.executable, SCRIPTS / "ray_batch.py", prompts[0], out]
    command += ["--model", TARGET, "--draft", DRAFT, "--max-tokens", str(MAX_TOKENS)]
    command += ["--batch-size", "4", "--engine", json.dumps(ENGINE)]
    environment = os.environ | {"RAY_ADDRESS": cluster}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def answers(out) -> list[dict]:
    files = sorted((out / "answers").glob("*.json"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def wait_for_some(process, out) -> int:
    give_up = time.monotonic() + SECONDS
    while len(answers(out)) < 30:
        assert process.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.3)
    return len(answers(out))


def assert_every_row_once(out, single_engine):
    rows = answers(out)
    assert sorted(row["id"] for row in rows) == sorted(single_engine)
    assert {row["id"]: row["text"] for row in rows} == single_engine


def test_a_replica_is_killed(cluster, prompts, single_engine, tmp_path):
    process = start(cluster, prompts, tmp_path)
    assert wait_for_some(process, tmp_path) < len(single_engine)
    replicas = [
        p for p in psutil.process_iter(["cmdline"]) if "vLLMEngine" in " ".join(p.info["cmdline"])
    ]
    assert replicas  # the second may still be starting
    replicas[0].send_signal(signal.SIGKILL)
    assert process.wait(SECONDS) == 0
    assert_every_row_once(tmp_path, single_engine)


def test_the_run_is_killed_and_goes_on(cluster, prompts, single_engine, tmp_path):
    process = start(cluster, prompts, tmp_path)
    assert wait_for_some(process, tmp_path) < len(single_engine)
    process.kill()
    process.wait()
    time.sleep(3)
    assert start(cluster, prompts, tmp_path).wait(SECONDS) == 0
    assert_every_row_once(tmp_path, single_engine)
    assert start(cluster, prompts, tmp_path).wait(SECONDS) == 0  # nothing is left to do
    assert_every_row_once(tmp_path, single_engine)
