# SPDX-License-Identifier: Apache-2.0
"""What `scripts/bench_kernels.py` measures: one module per kernel.

Each has `SETTINGS` (the full grid), `QUICK` (a small one), `prepare(setting, device)` and `PLOT`.
"""
