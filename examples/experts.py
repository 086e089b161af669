# SPDX-License-Identifier: Apache-2.0
"""Draft trees for a mixture of experts, from a few requests at a time on (docs/experts.md).

python examples/experts.py
"""

import sys
from typing import Any

from vllm import LLM, SamplingParams

TARGET = "Qwen/Qwen3-30B-A3B"
DRAFT = "Qwen/Qwen3-0.6B"
# One request alone drafts nothing: each drafted token would read experts of its own.
SCHEDULE = [[1, 1, None], [2, None, "binary:2"]]
PROMPTS = ["def parse_header(line):\n", "class Reader:\n    def __init__(self, stream):\n"]


def main(target: str = TARGET, draft: str = DRAFT, **engine: Any) -> None:
    """Print the answers to two prompts, and how many trees one request and two had.

    Args:
        target: a mixture of experts.
        draft: a model of the same vocabulary.
        engine: further options of `vllm.LLM`.
    """
    llm = LLM(
        target,
        speculative_config={"method": "spechub", "model": draft, "tree_by_batch_size": SCHEDULE},
        disable_log_stats=False,  # for the metrics below
        **{"max_model_len": 4096} | engine,
    )
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    verified = 0
    for prompts in (PROMPTS[:1], PROMPTS):
        requests = llm.generate(prompts, params)
        totals = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
        before, verified = verified, totals["vllm:spec_decode_num_drafts"]
        print(f"{verified - before} trees for {len(prompts)} at a time")
    for request in requests:
        print(request.prompt + request.outputs[0].text, end="\n\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
