#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Serve the OpenAI API with draft trees. The models are the demo pair unless TARGET and DRAFT name
# others; further arguments go to `vllm serve`:
#
#     bash examples/serve.sh
#     TARGET=... DRAFT=... bash examples/serve.sh --port 8001
set -euo pipefail
pair="$(cd "$(dirname "$0")/../scripts/demo_pair" && pwd)"

# The demo pair needs little memory, and vLLM would take all it can.
[ -n "${TARGET:-}" ] || set -- --kv-cache-memory-bytes $((256 << 20)) "$@"

exec vllm serve "${TARGET:-$pair/target}" \
    --speculative-config spechub --spec-model "${DRAFT:-$pair/draft}" \
    --served-model-name spechub "$@"
