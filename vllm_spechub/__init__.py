# SPDX-License-Identifier: Apache-2.0
"""vllm-spechub: lossless speculative decoding with SpecHub draft trees, for vLLM."""

__version__ = "0.1.0"
