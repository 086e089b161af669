# SPDX-License-Identifier: Apache-2.0
"""Draft trees with the first layers of a nested draft, which serves several targets
(docs/nested-drafts.md).

python examples/nested_draft.py
"""

from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

PAIR = Path(__file__).parents[1] / "scripts" / "demo_pair"
TARGET, DRAFT = PAIR / "exit_target", PAIR / "nested"
PROMPTS = ["def parse_header(line):\n", "class Reader:\n    def __init__(self, stream):\n"]


def main(**engine: Any) -> None:
    """Print the answers to two prompts.

    Args:
        engine: further options of `vllm.LLM`.
    """
    llm = LLM(
        str(TARGET),
        speculative_config={"method": "spechub", "model": str(DRAFT), "draft_layers": 6},
        dtype="float32",
        kv_cache_memory_bytes=256 << 20,  # small models need little; vLLM would take all it can
        disable_log_stats=False,  # for the metrics below
        **engine,
    )
    for request in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=64)):
        print(request.prompt + request.outputs[0].text, end="\n\n")

    totals = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    drafts = totals["vllm:spec_decode_num_drafts"]
    accepted = totals["vllm:spec_decode_num_accepted_tokens"]
    print(f"{1 + accepted / drafts:.2f} tokens per verified tree")


if __name__ == "__main__":
    main()
