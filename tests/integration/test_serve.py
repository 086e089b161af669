# SPDX-License-Identifier: Apache-2.0
"""`examples/serve.sh`, through OpenAI's client: plain vLLM's answers, no upsets."""

import json
import os
import re
import runpy
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.sampling_params import StructuredOutputsParams

from helpers.pair import PAIR, ROOT, TARGET
from helpers.serving import fetch, serving

VLLM = Path(sys.executable).with_name("vllm")
GRAMMARS = {"backend": "xgrammar", "disable_any_whitespace": True}
PROMPTS = [
    "def parse_header(line):\n",
    "class Reader:\n    def __init__(self, stream):\n        self",
    "import os\nimport sys\n\n\ndef main():\n",
    "    for key, value in sorted(items):\n        if key not in self._cache",
]
MAX_TOKENS = 32
REGEX = "[a-z_ .=()]{24}"
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["file", "directory"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def plain():
    """Plain vLLM's texts: for PROMPTS, then for the first of them under REGEX and under SCHEMA."""

    def greedy(**constraint):
        grammar = StructuredOutputsParams(**constraint) if constraint else None
        return SamplingParams(temperature=0, max_tokens=MAX_TOKENS, structured_outputs=grammar)

    params = [greedy()] * len(PROMPTS) + [greedy(regex=REGEX), greedy(json=SCHEMA)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        llm = LLM(
            TARGET,
            dtype="float32",
            max_model_len=256,
            max_num_seqs=8,
            enforce_eager=True,
            kv_cache_memory_bytes=64 << 20,
            structured_outputs_config=GRAMMARS,
        )
        try:
            outputs = llm.generate([*PROMPTS, *PROMPTS[:1] * 2], params, use_tqdm=False)
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()
    return [output.outputs[0].text for output in outputs]


def fetch_json(url, question):
    """The answer to a question that is posted as JSON."""
    body = json.dumps(question).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    return json.loads(fetch(request, timeout=60))


@pytest.fixture(scope="module")
def server(plain, tmp_path_factory):
    """The server's address."""
    log = tmp_path_factory.mktemp("serve") / "log"
    command = ["bash", ROOT / "examples" / "serve.sh"]
    command += ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8"]
    command += ["--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20)]
    command += ["--structured-outputs-config", json.dumps(GRAMMARS)]
    command += ["--enable-scale-out"]  # for /inference/v1/generate
    command += ["--served-model-name", "demo"]
    with serving(command, log, PATH=f"{VLLM.parent}:{os.environ['PATH']}") as address:
        started = log.read_text()
        for line in (
            "verification  traversal",
            "binary:3: 14 nodes, depth 3",
            "├─ 1",
            "1.2 MiB of draft weights",  # 320,688 parameters, as the card says, in fp32
            "MiB for the draft's logits",
            "MiB for the target's logits",
        ):
            assert line in started
        yield address


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=120) as it:
        yield it


def complete(client, prompt=PROMPTS[0], **options):
    options = {"temperature": 0, "max_tokens": MAX_TOKENS} | options
    return client.completions.create(model="demo", prompt=prompt, **options)


def metric(server, pattern):
    """The sum of the metrics whose name and labels match the pattern."""
    lines = fetch(f"{server}/metrics").splitlines()
    return sum(float(line.split()[-1]) for line in lines if re.match(pattern, line))


def test_greedy_texts_in_parallel(client, server, plain):
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(lambda prompt: complete(client, prompt), PROMPTS))
    assert [answer.choices[0].text for answer in answers] == plain[: len(PROMPTS)]
    assert all(answer.usage.completion_tokens == MAX_TOKENS for answer in answers)
    assert metric(server, r"vllm:spec_decode_num_drafts_total\b") > 0
    accepted = metric(server, r"vllm:spec_decode_num_accepted_tokens_total\b")
    assert accepted > 0
    # a tree's own figures reach the server's process
    assert metric(server, r"vllm:spechub_num_accepted_tokens_per_slot_total\b") == accepted
    drafts = metric(server, r"vllm:spec_decode_num_drafts_total\b")
    assert metric(server, r"vllm:spechub_emitted_tokens_count\b") == drafts
    assert metric(server, r'vllm:spechub_steps_total.*width="14"') > 0


def test_the_example_of_a_client(server, plain, capsys):
    main = runpy.run_path(str(ROOT / "examples" / "client.py"))["main"]
    main(server)
    printed = capsys.readouterr().out
    assert printed.startswith(PROMPTS[0] + plain[0])
    accepted = metric(server, r"vllm:spec_decode_num_accepted_tokens_total\b")
    drafts = metric(server, r"vllm:spec_decode_num_drafts_total\b")
    assert 1.5 < 1 + accepted / drafts < 5
    said = f"{1 + accepted / drafts:.2f} tokens per verified tree since the server started"
    assert printed.splitlines()[-1] == said


def test_the_dashboards_metrics_exist(server):
    dashboard = (ROOT / "docs" / "grafana.json").read_text()
    names = set(re.findall(r"vllm:\w+", dashboard))
    assert len(names) > 8
    assert names <= set(re.findall(r"^vllm:\w+", fetch(f"{server}/metrics"), re.MULTILINE))


def test_streaming_equals_the_whole_answer(client, plain):
    chunks = [chunk.choices[0].text for chunk in complete(client, stream=True)]
    assert "".join(chunks) == plain[0]
    assert 1 < len(chunks) <= MAX_TOKENS


def test_logprobs(client, plain):
    choice = complete(client, logprobs=2).choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text == plain[0]
    pairs = zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True)
    for chosen, top in pairs:
        assert len(top) >= 2
        assert chosen == max(top.values()) <= 0  # greedy


def test_chat(client, plain):
    """The demo pair's template joins a chat's texts, so the answer is a completion's."""
    messages = [{"role": "user", "content": PROMPTS[0]}]
    options = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
    choice = client.chat.completions.create(**options, logprobs=True, top_logprobs=1).choices[0]
    assert choice.message.content == plain[0]
    assert "".join(entry.token for entry in choice.logprobs.content) == plain[0]
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == plain[0]


def test_bench_serve(server, tmp_path):
    """vLLM's own load test, on a file in Spec-Bench's format."""
    report = tmp_path / "bench.json"
    command = [VLLM, "bench", "serve", "--base-url", server, "--model", TARGET]
    command += ["--served-model-name", "demo", "--dataset-name", "spec_bench"]
    command += ["--dataset-path", PAIR / "prompts.jsonl", "--spec-bench-output-len", "16"]
    command += ["--num-prompts", "6", "--temperature", "0", "--ignore-eos"]
    command += ["--save-result", "--result-filename", report]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    result = json.loads(report.read_text())
    assert (result["completed"], result["total_output_tokens"]) == (6, 6 * 16)
    assert result["spec_decode_draft_tokens"] > 0
    assert result["spec_decode_acceptance_length"] > 1.5


def test_seeded_samples(client):
    first, again, other = (
        [choice.text for choice in complete(client, temperature=1, n=2, seed=seed).choices]
        for seed in (7, 7, 8)
    )
    assert len(set(first)) == 2
    assert first == again
    assert first != other


def test_a_client_that_leaves_is_forgotten(client, server, plain):
    tokens, answers = r"vllm:generation_tokens_total\b", 64  # more than are done before it has left
    before = metric(server, tokens)
    forever = {"temperature": 1, "max_tokens": 240, "extra_body": {"ignore_eos": True}}
    stream = complete(client, n=answers, stream=True, **forever)
    next(iter(stream))
    stream.close()
    assert complete(client).choices[0].text == plain[0]
    give_up = time.monotonic() + 60
    while metric(server, r"vllm:num_requests_running\b"):
        assert time.monotonic() < give_up
        time.sleep(0.1)
    assert metric(server, tokens) - before < answers * 240


def test_what_vllm_refuses_under_speculation(client):
    """min_p and logit_bias are served, and do what they say."""
    certain = complete(client, temperature=1, seed=1, extra_body={"min_p": 1.0})
    assert certain.choices[0].text == complete(client).choices[0].text
    token = complete(client, max_tokens=1, logprobs=0, logit_bias={"289": 100}).choices[0]
    assert token.text == " self"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "x = 1\n" * 300}, "maximum context length"),
        ({"max_tokens": 1000}, "max_tokens|maximum context length"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 3}, "top_p"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias with 1025 tokens"),
        ({"extra_body": {"structured_outputs": {"regex": "(["}}}, "(?i)regex|grammar"),
        ({"seed": 2**63}, "seed"),
        ({"temperature": 1, "seed": 2**63 - 1, "n": 2}, "seed=9223372036854775808 is not"),
        ({"extra_body": {"priority": 2**70}}, "priority"),
    ],
)
def test_refusals(client, plain, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        complete(client, **options)
    assert complete(client).choices[0].text == plain[0]


def test_numbers_of_any_size(client, server, plain):
    """The route that hands sampling parameters on as they are: answered, or refused in a line."""
    ids = fetch_json(f"{server}/tokenize", {"model": "demo", "prompt": PROMPTS[0]})["tokens"]

    def generate(**params):
        params = {"temperature": 0, "max_tokens": 4, "ignore_eos": True} | params
        request = {"model": "demo", "token_ids": ids, "sampling_params": params}
        return fetch_json(f"{server}/inference/v1/generate", request)

    def answer(**params):
        return generate(**params)["choices"][0]["token_ids"]

    def refusal(**params):
        with pytest.raises(urllib.error.HTTPError) as error:
            generate(**params)
        assert error.value.code == 400
        return error.value.read().decode()

    whole = answer(max_tokens=256 - len(ids))
    assert len(whole) == 256 - len(ids)
    for size in (2**31 - 1, 2**31, 2**63 - 1, 2**63):
        assert answer(max_tokens=size) == whole
        assert answer(top_k=size) == whole[:4]
        if size < 2**63:
            assert answer(seed=size) == whole[:4]
        else:
            assert f"seed={size} is not supported" in refusal(seed=size)
    assert answer(top_k=2**70) == whole[:4]
    # vLLM's route itself refuses larger integers here
    for name in ("max_tokens", "seed"):
        assert "can't serialize ints" in refusal(**{name: 2**70})
    assert complete(client).choices[0].text == plain[0]


def test_regex(client, plain):
    text = complete(client, extra_body={"structured_outputs": {"regex": REGEX}}).choices[0].text
    assert re.fullmatch(REGEX, text)
    assert text == plain[-2] != plain[0][: len(text)]


def test_json_schema(client, plain):
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    text = complete(client, extra_body={"response_format": form}).choices[0].text
    answer = json.loads(text)
    assert set(answer) == {"ok", "kind"}
    assert isinstance(answer["ok"], bool)
    assert text == plain[-1]
