# SPDX-License-Identifier: Apache-2.0
"""Answer a file of prompts with draft trees, and write the answers to `answers.jsonl`.

python examples/offline_batch.py
"""

import json
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

PAIR = Path(__file__).parents[1] / "scripts" / "demo_pair"


def main(out: Path = Path("answers.jsonl"), **engine: Any) -> None:
    """Generate one answer to each prompt of the demo pair.

    Args:
        out: the file to write, one JSON object a line.
        engine: further options of `vllm.LLM`.
    """
    lines = (PAIR / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["turns"][0] for line in lines]
    llm = LLM(
        str(PAIR / "target"),
        speculative_config={"method": "spechub", "model": str(PAIR / "draft"), "tree": "auto"},
        dtype="float32",
        kv_cache_memory_bytes=256 << 20,  # small models need little; vLLM would take all it can
        disable_log_stats=False,  # for the metrics below
        **engine,
    )
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=64, seed=0)
    with out.open("w", encoding="utf-8") as file:
        for request in llm.generate(prompts, params):
            record = {"prompt": request.prompt, "answer": request.outputs[0].text}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    totals = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    drafts = totals["vllm:spec_decode_num_drafts"]
    accepted = totals["vllm:spec_decode_num_accepted_tokens"]
    print(f"{len(prompts)} answers in {out}, {1 + accepted / drafts:.2f} tokens per verified tree")


if __name__ == "__main__":
    main()
