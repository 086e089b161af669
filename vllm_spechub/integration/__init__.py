# SPDX-License-Identifier: Apache-2.0
"""Every touch of vLLM's processes: patches, workers, schedulers, metrics, refusals."""
