# SPDX-License-Identifier: Apache-2.0
"""The end-to-end benchmark through real engines, and the pair of models that it can make."""

import csv
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from helpers.pair import SCRIPTS


def test_a_small_run(tmp_path):
    command = [sys.executable, SCRIPTS / "bench_e2e.py", "-b", "2", "-T", "1", "-K", "1", "-K", "2"]
    command += ["--tokens", "8", "--repetitions", "1", "--out", tmp_path]
    command += ["--engine", '{"enforce_eager": true}']
    env = os.environ | {"COLUMNS": "120"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "measurements.csv").read_text().splitlines()
    about = [line for line in lines if line.startswith("#")]
    assert any("bench_e2e.py" in line for line in about)
    assert any("commit" in line for line in about)
    rows = {r["method"]: r for r in csv.DictReader(line for line in lines if line not in about)}
    assert list(rows) == ["plain", "chain 1", "chain 2", "SpecHub"]
    speed = {method: float(r["tokens_per_s"]) for method, r in rows.items()}
    for method, found in rows.items():
        assert float(found["against_plain"]) == pytest.approx(speed[method] / speed["plain"], 1e-3)
        # two requests, each of which gets this many tokens from a step
        tokens_per_s = 2000 * float(found["tokens_per_step"]) / float(found["ms_per_step"])
        assert speed[method] == pytest.approx(tokens_per_s, 0.02)
    assert float(rows["plain"]["tokens_per_step"]) == 1
    assert len(json.loads(rows["SpecHub"]["accepted_by_depth"])) <= 3
    assert 1 < float(rows["SpecHub"]["tokens_per_step"]) <= 4
    assert 1 < float(rows["chain 1"]["tokens_per_step"]) <= 2
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    assert "best chain" in done.stdout
    assert "a chain of 14: not measured" in done.stdout


def test_an_engine_that_does_not_start_says_why(tmp_path):
    from vllm_spechub.measure.benchmark.engine import EngineFailed, EngineProcess, close_all

    target = str(SCRIPTS / "demo_pair" / "target")
    wrong = {"method": "spechub", "model": target, "tree": "binary:9"}
    engine = EngineProcess({"model": target, "speculative_config": wrong}, tmp_path / "log")
    with pytest.raises(EngineFailed, match=r"speculative_config\['tree'\]: a tree has 1 to 63"):
        engine.wait()
    close_all([engine])
    with pytest.raises(ProcessLookupError):
        os.kill(engine.pid, 0)


def test_engines_end_with_the_process_that_started_them(tmp_path, monkeypatch):
    """Those that were started before others, too."""
    from vllm_spechub.measure.benchmark.engine import EngineProcess

    core = SimpleNamespace(shutdown=lambda timeout: None)
    llm = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core))
    monkeypatch.setattr("vllm.LLM", lambda **options: llm)
    engines = [EngineProcess({}, tmp_path / f"{i}.log") for i in range(2)]
    for engine in engines:
        engine.wait()
    for engine in engines:
        engine._connection.close()  # as if this process had ended
        engine._process.join(10)
        assert engine._process.exitcode == 0


LEAVING = """
import sys
from pathlib import Path
from types import SimpleNamespace
import psutil
from vllm_spechub.measure.benchmark.engine import EngineProcess, close_all

options = {"model": sys.argv[1], "max_model_len": 64}
options |= {"kv_cache_memory_bytes": 16 << 20, "enforce_eager": True}
engine = EngineProcess(options, Path(sys.argv[2]))
engine.wait()
for process in psutil.Process(engine.pid).children(recursive=True):
    for mapped in process.memory_maps():
        if mapped.path.startswith("/dev/shm/psm_"):
            print(mapped.path)
close_all([engine])
"""


def test_an_engine_leaves_no_shared_memory(tmp_path):
    # In a Python of its own: where an engine ran before, vLLM's classes and settings are its, too.
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    command = [sys.executable, "-c", LEAVING, SCRIPTS / "demo_pair" / "target", tmp_path / "log"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    shared = set(done.stdout.split())
    assert shared  # its message queues
    late = time.monotonic() + 20
    while any(map(os.path.exists, shared)) and time.monotonic() < late:
        time.sleep(0.1)
    assert not any(map(os.path.exists, shared))


@pytest.fixture(scope="module")
def maker():
    sys.path.insert(0, str(SCRIPTS))
    import make_pair

    yield make_pair
    sys.path.remove(str(SCRIPTS))


@torch.inference_mode()
@pytest.mark.parametrize("overlap", [0.5, 0.85])
def test_a_made_pair_overlaps_as_asked(maker, tmp_path, overlap):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    maker.make_pair(tmp_path, "8b-tiny", "1b-tiny", overlap, entropy=2.5, seed=1)
    target, draft = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        for name in ("target", "draft")
    )
    tokens = torch.randint(1, 2048, (32, 48), generator=torch.Generator().manual_seed(2))
    p, q = (torch.softmax(model(tokens).logits, dim=-1) for model in (target, draft))
    assert float(torch.minimum(p, q).sum(dim=-1).mean()) == pytest.approx(overlap, abs=0.03)
    for probs, tolerance in ((q, 0.1), (p, 0.2)):
        entropy = float(torch.distributions.Categorical(probs).entropy().mean())
        assert entropy == pytest.approx(2.5, abs=tolerance)
    # The target holds the draft: without the rest of its output matrix it is the draft.
    small = draft.config.hidden_size
    target.lm_head.weight[:, small:] = 0
    r = target(tokens).logits
    r = torch.softmax(r * (draft(tokens).logits.norm() / r.norm()), dim=-1)
    assert float(torch.minimum(r, q).sum(dim=-1).mean()) > 0.99
    # Texts are read and written by words.
    prompt = json.loads((tmp_path / "prompts.jsonl").read_text().splitlines()[0])["prompt"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "target")
    assert tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt


def test_what_no_pair_can_have_is_refused(maker, tmp_path):
    with pytest.raises(ValueError, match="a larger hidden size"):
        maker.make_pair(tmp_path, "1b", "8b", 0.7, 2.5, 0)
    with pytest.raises(ValueError, match="'7b' is not a size, allowed: 8b"):
        maker.make_pair(tmp_path, "7b", "1b", 0.7, 2.5, 0)
    with pytest.raises(ValueError, match="out of reach"):
        maker.make_pair(tmp_path, "8b-tiny", "1b-tiny", 0.01, 2.5, 0)
