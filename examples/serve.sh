#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Serve the OpenAI API with draft trees. The models are the demo pair unless TARGET and DRAFT name
# others; further arguments go to `vllm serve`:
#
#     bash examples/serve.sh
#     TARGET=... DRAFT=... bash examples/serve.sh --port 8001
set -euo pipefail
pair="$(cd "$(dirname "$0")/../scripts/demo_pair" && pwd)"

exec vllm serve "${TARGET:-$pair/target}" \
    --speculative-config spechub --spec-model "${DRAFT:-$pair/draft}" \
    --served-model-name spechub "$@"
