# SPDX-License-Identifier: Apache-2.0
"""Measurements of real engines: benchmarks that compare them, and tuning."""
