# SPDX-License-Identifier: Apache-2.0
"""Contrastive decoding, faster than decoding both models plainly (docs/combined-targets.md).

python examples/contrastive_decoding.py
"""

from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

PAIR = Path(__file__).parents[1] / "scripts" / "demo_pair"
PROMPT = "class Reader:\n    def __init__(self, stream):\n"
ASKED = {
    "contrastive": {},
    "more contrastive": {"target_beta": 1.0},
    "the target alone": {"target_distribution": "off"},
}
"""What a request may say of its distribution, in `extra_args`; over HTTP, in `vllm_xargs`."""


def main(**engine: Any) -> None:
    """Print three answers to one prompt, which one engine gives at once.

    Args:
        engine: further options of `vllm.LLM`.
    """
    llm = LLM(
        str(PAIR / "target"),
        speculative_config={
            "method": "spechub",
            "model": str(PAIR / "draft"),
            # what the draft finds likelier than the target does loses, among plausible tokens
            "target_distribution": {"type": "contrastive", "beta": 0.5, "alpha": 0.1},
            "sharpening": 2.0,  # such a distribution is sharper than the draft's
        },
        dtype="float32",
        kv_cache_memory_bytes=256 << 20,  # small models need little; vLLM would take all it can
        disable_log_stats=False,  # for the metrics below
        **engine,
    )
    params = [
        SamplingParams(temperature=0.8, seed=0, max_tokens=48, extra_args=extra_args)
        for extra_args in ASKED.values()
    ]
    answers = llm.generate([PROMPT] * len(params), params)
    for name, answer in zip(ASKED, answers, strict=True):
        print(f"# {name}\n{PROMPT}{answer.outputs[0].text}", end="\n\n")

    totals = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    drafts = totals["vllm:spec_decode_num_drafts"]
    accepted = totals["vllm:spec_decode_num_accepted_tokens"]
    print(f"{1 + accepted / drafts:.2f} tokens per verified tree")


if __name__ == "__main__":
    main()
