#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Measures steps of level widths beside those of a static tree of as many nodes and levels, and writes
# measurements.csv beside this file. Arguments go to scripts/bench_e2e.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
out=$(mktemp -d)
configs=()
for draft in draft eagle3; do
    for tree in '"levels:3,4,4,3"' '[0,0,0,1,1,2,3,4,5,6,7,8,9,10]'; do
        case $tree in *levels*) name="levels, $draft" ;; *) name="static, $draft" ;; esac
        configs+=(--config "$name={\"method\": \"spechub\", \"model\": \"scripts/demo_pair/$draft\", \"tree\": $tree, \"verification\": \"mixed\"}")
    done
done
python scripts/bench_e2e.py scripts/demo_pair/target --draft scripts/demo_pair/draft \
    --prompts scripts/demo_pair/prompts.jsonl --engine '{"dtype": "float32"}' \
    -b 4 -T 0.6 -T 1 -K 3 "${configs[@]}" --tokens 128 --repetitions 5 --out "$out" "$@"
[ ! -e "$out/measurements.csv" ] || cp "$out/measurements.csv" docs/benchmarks/levels/
