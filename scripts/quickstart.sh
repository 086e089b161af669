#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# On a fresh machine: install everything, then generate with four methods and compare them.
. "$(dirname "$0")/env.sh"
if [ ! -e .venv/.compiled ]; then
    # vLLM compiles each model once per machine; later runs use its cache.
    echo "Compiling the demo models for this machine (only once; under two minutes)"
    "$PYTHON" scripts/quickstart.py --max-tokens 1 > .venv/compile.log
    touch .venv/.compiled
fi
exec "$PYTHON" scripts/quickstart.py "$@"
