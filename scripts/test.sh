#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The whole test suite, lint first. Arguments go to pytest's last run, for example: -k greedy -x
. "$(dirname "$0")/env.sh"
ruff check .
ruff format --check .
lint-imports --no-cache
pyright
cog --check -I scripts README.md docs/*.md
# Two processes share a group: nearly all of a test is one thread's work, an engine's start too.
# Kernels run under Triton's interpreter, which has to be chosen before Triton is imported.
TRITON_INTERPRET=1 pytest -q -n 2 tests/kernels
TRITON_INTERPRET=1 pytest -q -n 2 tests/host_kernels
# Collecting it imports Numba, which an engine's start in the same process would stumble over.
pytest -q tests/compiled
# One OpenMP thread an engine, on any core: two engines at a time would only spin for each other.
export OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
pytest -q -n 2 --dist loadfile tests/test_*.py tests/engine "$@"
