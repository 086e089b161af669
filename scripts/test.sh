#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The whole test suite, lint first. Arguments go to pytest's last run, for example: -k greedy -x
. "$(dirname "$0")/env.sh"
ruff check .
ruff format --check .
# Two processes share a group: nearly all of a test is one thread's work, an engine's start too.
# Triton's interpreter is a whole process's, and so is vLLM with Triton.
pytest -q -n 2 --dist worksteal tests/kernels
pytest -q -n 2 --dist worksteal tests/cpu/vllm_kernels
pytest -q -n 2 --dist worksteal tests --ignore=tests/kernels --ignore=tests/cpu/vllm_kernels \
    --ignore=tests/ray_cluster "$@"
