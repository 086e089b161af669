# SPDX-License-Identifier: Apache-2.0
"""Measure real engines: benchmarks that compare them, and tuning."""
