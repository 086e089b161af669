# SPDX-License-Identifier: Apache-2.0
"""vLLM's own benchmarks run to their end with `--speculative-config spechub`."""

import json
import os
import subprocess
import sys
from pathlib import Path

from transformers import LlamaConfig

from helpers.pair import PAIR

COMMON = ["--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "4", "--enforce-eager"]
COMMON += ["--kv-cache-memory-bytes", str(32 << 20), "--speculative-config", "spechub"]


def bench(what, *options, output):
    """Run `vllm bench`. -> its JSON report and its log"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process starts in half the time of two
    vllm = Path(sys.executable).with_name("vllm")
    done = subprocess.run(
        [vllm, "bench", what, *COMMON, *options, "--output-json", output],
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    return json.loads(output.read_text()), log


def test_latency(tmp_path):
    """Its prompts are random ids below 10000, so both models get that many and random weights."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=10000,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
    )
    config.save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    options = ["--model", model, "--spec-model", model, "--load-format", "dummy"]
    options += ["--skip-tokenizer-init", "--disable-detokenize"]
    options += ["--input-len", "8", "--output-len", "8", "--batch-size", "2"]
    options += ["--num-iters-warmup", "1", "--num-iters", "1"]
    report, log = bench("latency", *options, output=tmp_path / "latency.json")
    assert report["avg_latency"] > 0
    assert "speculative_config=SpecHubConfig" in log


def test_throughput(tmp_path):
    options = ["--model", str(PAIR / "target"), "--spec-model", str(PAIR / "draft")]
    options += ["--dataset-name", "random", "--num-prompts", "2"]
    options += ["--random-input-len", "8", "--random-output-len", "8"]
    report, log = bench("throughput", *options, output=tmp_path / "throughput.json")
    assert report["num_requests"] == 2
    assert report["tokens_per_second"] > 0
    assert "speculative_config=SpecHubConfig" in log
