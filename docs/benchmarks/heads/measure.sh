#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Measures the demo target with its EAGLE-3 head and its draft model, beside vLLM's chains of both, and
# writes measurements.csv beside this file. Arguments go to scripts/bench_e2e.py: for a trial,
#     bash docs/benchmarks/heads/measure.sh --tokens 8 --repetitions 1 --out /tmp/trial
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
out=$(mktemp -d)
head=scripts/demo_pair/eagle3
python scripts/bench_e2e.py scripts/demo_pair/target --draft scripts/demo_pair/draft \
    --prompts scripts/demo_pair/prompts.jsonl --engine '{"dtype": "float32"}' \
    -b 4 -T 0 -T 1 -K 3 --tree chain:3 \
    --config "vLLM EAGLE-3 chain 3={\"method\": \"eagle3\", \"model\": \"$head\", \"num_speculative_tokens\": 3, \"draft_sample_method\": \"probabilistic\"}" \
    --config "EAGLE-3 chain:3={\"method\": \"spechub\", \"model\": \"$head\", \"tree\": \"chain:3\"}" \
    --config "EAGLE-3 binary:3={\"method\": \"spechub\", \"model\": \"$head\", \"tree\": \"binary:3\"}" \
    --tokens 128 --repetitions 7 --out "$out" "$@"
[ ! -e "$out/measurements.csv" ] || cp "$out/measurements.csv" docs/benchmarks/heads/
