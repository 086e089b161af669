# SPDX-License-Identifier: Apache-2.0
"""vllm-spechub: lossless speculative decoding with draft trees, for vLLM and without it.

vLLM finds the plugin by its entry point. What this module exports needs torch but not vLLM.
"""

from vllm_spechub.offline.draft_and_verify import DraftTree, draft_tree, verify_tree
from vllm_spechub.rules.acceptance import Acceptance, acceptance
from vllm_spechub.rules.optimum import otm
from vllm_spechub.trees.level_tree import LevelTree
from vllm_spechub.trees.tree import TokenTree

__version__ = "0.1.0"
__all__ = [
    "Acceptance",
    "DraftTree",
    "LevelTree",
    "TokenTree",
    "acceptance",
    "draft_tree",
    "otm",
    "verify_tree",
]
