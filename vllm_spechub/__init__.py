# SPDX-License-Identifier: Apache-2.0
"""vllm-spechub: lossless speculative decoding with draft trees, for vLLM and without it.

vLLM finds the plugin by its entry point. The names here need torch and no vLLM.
"""

from vllm_spechub.library import DraftTree, draft_tree, verify_tree
from vllm_spechub.node_acceptance import Acceptance, acceptance
from vllm_spechub.optimal_transport import otm
from vllm_spechub.topology import TokenTree

__version__ = "0.1.0"
__all__ = [
    "Acceptance",
    "DraftTree",
    "TokenTree",
    "acceptance",
    "draft_tree",
    "otm",
    "verify_tree",
]
