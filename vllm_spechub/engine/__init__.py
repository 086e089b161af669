# SPDX-License-Identifier: Apache-2.0
"""Trees inside vLLM's V2 model runner: inputs, sampling and the worker that puts them in place."""
