#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Lint, then the whole test suite. Arguments go to the last run of pytest, for example: -k greedy -x
. "$(dirname "$0")/env.sh"
ruff check .
ruff format --check .
lint-imports --no-cache
pyright
cog --check -I scripts README.md docs/*.md

# A process can either use Triton's interpreter, or see vLLM with Triton, or neither: each is a group of
# its own. Two processes share a group, because nearly every test keeps only one thread busy. A process
# that has run out of tests takes some from the other.
failed=""
group() { pytest -q -n 2 --dist worksteal "$@" || failed="$failed $1"; }
group tests/kernels
group tests/cpu/vllm_kernels
group tests "$@"  # all others
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
