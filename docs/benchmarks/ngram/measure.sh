#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Measures the n-gram proposer on prompts that repeat themselves, and writes measurements.csv beside this
# file. Arguments go to scripts/bench_e2e.py: for a trial,
#     bash docs/benchmarks/ngram/measure.sh --tokens 8 --repetitions 1 --out /tmp/trial
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
out=$(mktemp -d)
python scripts/bench_e2e.py scripts/demo_pair/target --draft scripts/demo_pair/draft \
    --prompts docs/benchmarks/ngram/prompts.jsonl --engine '{"dtype": "float32"}' \
    -b 1 -b 4 -T 0 -K 8 \
    --config 'vLLM ngram 8={"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 5, "prompt_lookup_min": 1}' \
    --config 'ngram chain:8={"method": "spechub", "proposer": "ngram", "tree": "chain:8"}' \
    --config 'ngram caterpillar:8:2={"method": "spechub", "proposer": "ngram", "tree": "caterpillar:8:2"}' \
    --tokens 64 --repetitions 15 --out "$out" "$@"
[ ! -e "$out/measurements.csv" ] || cp "$out/measurements.csv" docs/benchmarks/ngram/
