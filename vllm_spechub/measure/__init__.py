# SPDX-License-Identifier: Apache-2.0
"""Measuring around engines: benchmarks that compare them, and tuning."""
