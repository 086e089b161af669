#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The main job on a fresh machine: install, then generate with three methods and compare.
. "$(dirname "$0")/env.sh"
if [ ! -e .venv/.compiled ]; then
    # vLLM compiles each model once per machine; what is measured later starts from its cache.
    echo "Compiling the demo's models for this machine (once; under two minutes)"
    "$PYTHON" scripts/quickstart.py --max-tokens 1 > .venv/compile.log
    touch .venv/.compiled
fi
exec "$PYTHON" scripts/quickstart.py "$@"
