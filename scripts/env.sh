# SPDX-License-Identifier: Apache-2.0
# Makes .venv with vLLM for the CPU and this package, once; sourced by the other scripts.
# Sets PYTHON and puts .venv/bin on PATH. Needs bash, Python 3.11 or newer, and pip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON_BASE="${PYTHON_BASE:-$(command -v python3.11 || command -v python3)}"
STAMP=".venv/.ready-$(cat pyproject.toml scripts/env.sh scripts/install_cpu.py | cksum | cut -d' ' -f1)"
if [ ! -e "$STAMP" ]; then
    echo "Preparing .venv (only once; a few minutes, about 4 GB)"
    "$PYTHON_BASE" -m venv .venv
    .venv/bin/python scripts/install_cpu.py
    touch "$STAMP"
fi
PATH="$PWD/.venv/bin:$PATH"
PYTHON="$PWD/.venv/bin/python"
