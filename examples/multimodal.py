# SPDX-License-Identifier: Apache-2.0
"""Draft trees for a target that reads images, with a draft that reads text (docs/multimodal.md).

python examples/multimodal.py IMAGE
"""

import sys
from typing import Any

from PIL import Image
from vllm import LLM, SamplingParams

TARGET = "Qwen/Qwen2.5-VL-7B-Instruct"
DRAFT = "Qwen/Qwen2.5-0.5B-Instruct"
QUESTIONS = ["What is in this picture?", "Describe its colours."]


def main(image: str, target: str = TARGET, draft: str = DRAFT, **engine: Any) -> None:
    """Print the answers to questions about an image.

    Args:
        image: a file.
        target: a multimodal model with a chat template.
        draft: a text model of the same vocabulary.
        engine: further options of `vllm.LLM`.
    """
    llm = LLM(
        target,
        speculative_config={"method": "spechub", "model": draft, "tree": "auto"},
        disable_log_stats=False,  # for the metrics below
        **{"max_model_len": 4096} | engine,
    )
    picture = {"type": "image_pil", "image_pil": Image.open(image)}
    conversations = [
        [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]
        for question in QUESTIONS
    ]
    params = SamplingParams(temperature=0, max_tokens=64)
    for question, request in zip(QUESTIONS, llm.chat(conversations, params), strict=True):
        print(question, request.outputs[0].text, sep="\n", end="\n\n")

    totals = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    drafts = totals["vllm:spec_decode_num_drafts"]
    accepted = totals["vllm:spec_decode_num_accepted_tokens"]
    print(f"{1 + accepted / drafts:.2f} tokens per verified tree")


if __name__ == "__main__":
    main(*sys.argv[1:])
