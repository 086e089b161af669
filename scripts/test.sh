#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The whole test suite, lint first. Arguments go to pytest's last run, for example: -k greedy -x
. "$(dirname "$0")/env.sh"
ruff check .
ruff format --check .
lint-imports --no-cache
pyright
cog --check -I scripts README.md docs/*.md

# Triton's interpreter, and vLLM with Triton, are a whole process's: each is a group of its own. Two
# processes share a group, because nearly all of a test is one thread's work; the one that has run
# out of tests takes some of the other's.
failed=""
group() { pytest -q -n 2 --dist worksteal "$@" || failed="$failed $1"; }
group tests/kernels
group tests/cpu/vllm_kernels
group tests "$@"  # all others
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
