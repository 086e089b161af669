# SPDX-License-Identifier: Apache-2.0
"""Run several engines and compare them. The quickstart, `bench_e2e.py` and `tune` share this."""
