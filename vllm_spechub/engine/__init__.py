# SPDX-License-Identifier: Apache-2.0
"""One step with draft trees inside vLLM's V2 model runner: its inputs, sampling and records."""
