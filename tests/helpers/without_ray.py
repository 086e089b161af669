# SPDX-License-Identifier: Apache-2.0
"""What one engine in a process of its own answers, to compare Ray's engines with."""

import json
import os
import subprocess
import sys

from helpers.pair import TARGET

ENGINE = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 64 << 20,
    "enforce_eager": True,
}


def without_ray(prompts: list[str], params: list[dict], **options) -> list[str]:
    """The texts that follow the prompts; without trees unless `options` ask for them."""
    program = (
        "import json, sys; from vllm import LLM, SamplingParams\n"
        "prompts, params, options = json.load(sys.stdin)\n"
        f"llm = LLM({TARGET!r}, **options)\n"
        "params = [SamplingParams(**each) for each in params]\n"
        "outputs = llm.generate(prompts, params, use_tqdm=False)\n"
        "print('\\n' + json.dumps([output.outputs[0].text for output in outputs]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps([prompts, params, ENGINE | options]),
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])
