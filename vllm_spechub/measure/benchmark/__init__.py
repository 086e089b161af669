# SPDX-License-Identifier: Apache-2.0
"""Run engines beside each other and compare them: quickstart, `bench_e2e` and `tune` share this."""
