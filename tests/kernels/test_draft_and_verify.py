# SPDX-License-Identifier: Apache-2.0
"""The library's "triton" backend: the kernels emit what the reference emits, toss for toss."""

import pytest
import torch

from vllm_spechub import TokenTree, draft_tree, verify_tree
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES

RULES = tuple(BUILTIN_RULES)

VOCAB = 11


@pytest.mark.parametrize("rule", RULES)
def test_triton_emits_what_torch_emits(rule, device):
    tree = TokenTree.chain(3) if rule == "chain" else TokenTree((0, 0, 0, 1, 1, 3, 4))
    generator = torch.Generator(device).manual_seed(1)
    table = torch.rand(2, VOCAB + 1, VOCAB, generator=generator, device=device).pow(2)
    table /= table.sum(dim=-1, keepdim=True)

    def after(probs, prefixes):
        last = torch.nn.functional.pad(prefixes, (1, 0), value=VOCAB)[:, -1]
        return probs[last]

    batch_size = 10
    draft = draft_tree(
        tree, lambda prefixes: after(table[0], prefixes), batch_size, rule=rule, generator=generator
    )
    paths = [[node - 1 for node in path[1:]] for path in tree.paths]
    rows = torch.stack([after(table[1], draft.tokens[:, path]) for path in paths], dim=1)
    found = {}
    for backend in ("torch", "triton"):
        generator = torch.Generator(device).manual_seed(2)
        found[backend] = verify_tree(draft, rows, generator=generator, backend=backend)
    for ours, theirs in zip(found["triton"], found["torch"], strict=True):
        assert torch.equal(ours, theirs)
    assert len(found["torch"][1].unique()) > 1
