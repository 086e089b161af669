#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The whole test suite, lint first. Arguments go to pytest's last run, for example: -k greedy -x
. "$(dirname "$0")/env.sh"
ruff check .
ruff format --check .
# Kernels run under Triton's interpreter, which has to be chosen before Triton is imported.
TRITON_INTERPRET=1 pytest tests/kernels -q
TRITON_INTERPRET=1 pytest tests/host_kernels -q
# Collecting it imports Numba, which an engine's start in the same process would stumble over.
pytest tests/compiled -q
pytest tests/test_*.py tests/engine -q "$@"
