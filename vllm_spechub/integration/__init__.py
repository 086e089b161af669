# SPDX-License-Identifier: Apache-2.0
"""Everything that touches vLLM's processes: patches, workers, schedulers, metrics, refusals."""
