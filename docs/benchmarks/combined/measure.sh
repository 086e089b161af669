#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Measures combined targets on the demo pair against decoding with the ensemble plainly, and writes
# measurements.csv beside this file. Arguments go to scripts/bench_e2e.py: for a trial,
#     bash docs/benchmarks/combined/measure.sh --tokens 8 --repetitions 1 --out /tmp/trial
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
out=$(mktemp -d)
draft=scripts/demo_pair/draft
configs=()
add() { configs+=(--config "$1=$(printf '{"method": "spechub", "model": "%s", "target_distribution": %s, %s}' "$draft" "$2" "$3")"); }
targets() {
    add "$1, plainly" "$2" '"tree_by_batch_size": [[1, 512, null], [513, null, "chain:1"]]'
    add "$1, chain:3" "$2" '"tree": "chain:3"'
    add "$1, binary:3" "$2" '"tree": "binary:3"'
    add "$1, chain:3 sharpened" "$2" '"tree": "chain:3", "sharpening": 2'
    add "$1, binary:3 sharpened" "$2" '"tree": "binary:3", "sharpening": 2'
}
targets mixture '{"type": "mixture", "weight": 0.3}'
targets logits '{"type": "logits", "weight": 0.5}'
targets contrastive '{"type": "contrastive", "beta": 0.5, "alpha": 0.1}'
python scripts/bench_e2e.py scripts/demo_pair/target --draft $draft \
    --prompts scripts/demo_pair/prompts.jsonl --engine '{"dtype": "float32"}' \
    -b 4 -T 1 -K 3 "${configs[@]}" --resident 6 \
    --tokens 128 --repetitions 3 --out "$out" "$@"
[ ! -e "$out/measurements.csv" ] || cp "$out/measurements.csv" docs/benchmarks/combined/
