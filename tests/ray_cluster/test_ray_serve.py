# SPDX-License-Identifier: Apache-2.0
"""The Ray Serve app on a local cluster: it starts, and answers as plain vLLM does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import openai
import pytest

from helpers.pair import DRAFT, SCRIPTS, TARGET
from helpers.without_ray import ENGINE, without_ray

PROMPTS = ["def parse_header(line):\n", "import os\nimport sys\n\n\ndef main():\n"]
GREEDY = {"temperature": 0, "max_tokens": 24}
START_SECONDS = 800  # on a busy machine Ray and its engines start slowly
pytestmark = pytest.mark.timeout(3 * START_SECONDS)


@pytest.fixture
def client(cluster, tmp_path):
    """A client of a running app, whose process is gone afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, SCRIPTS / "ray_serve.py", "--model", TARGET, "--draft", DRAFT]
    command += ["--name", "demo", "--port", str(port), "--engine", json.dumps(ENGINE)]
    environment = os.environ | {"RAY_ADDRESS": cluster}
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}/v1"
    try:
        # requests wait for the engine
        with openai.OpenAI(
            base_url=url, api_key="none", max_retries=0, timeout=START_SECONDS
        ) as it:
            give_up = time.monotonic() + START_SECONDS
            while True:
                try:
                    it.models.list()
                    break
                except openai.OpenAIError:
                    assert process.poll() is None, log.read_text()[-4000:]
                    assert time.monotonic() < give_up, log.read_text()[-4000:]
                    time.sleep(0.5)
            yield it
        assert "spechub: lossless speculative decoding" in log.read_text()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def test_answers_equal_plain_vllm(client):
    answers = [client.completions.create(model="demo", prompt=p, **GREEDY) for p in PROMPTS]
    texts = [answer.choices[0].text for answer in answers]
    assert texts == without_ray(PROMPTS, [GREEDY] * len(PROMPTS))
