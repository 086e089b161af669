# SPDX-License-Identifier: Apache-2.0
"""Ask a server that `examples/serve.sh` has started, and show how many tokens its steps emitted.

python examples/client.py [URL]
"""

import sys
from urllib.request import urlopen

from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

PROMPT = "def parse_header(line):\n"


def main(url: str = "http://localhost:8000") -> None:
    """Stream an answer, then read the server's metrics."""
    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        answer = client.completions.create(
            model=model, prompt=PROMPT, max_tokens=64, temperature=0, stream=True
        )
        print(PROMPT, end="")
        for chunk in answer:
            print(chunk.choices[0].text, end="", flush=True)
        print()

    with urlopen(f"{url}/metrics") as page:
        families = text_string_to_metric_families(page.read().decode())
    totals: dict[str, float] = {}
    for family in families:
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0) + sample.value
    drafts = totals["vllm:spec_decode_num_drafts_total"]
    accepted = totals["vllm:spec_decode_num_accepted_tokens_total"]
    print(f"{1 + accepted / drafts:.2f} tokens per verified tree since the server started")


if __name__ == "__main__":
    main(*sys.argv[1:])
