# SPDX-License-Identifier: Apache-2.0
"""Each rule's acceptance at one node beside the linear program's optimum for its own drafts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_spechub.offline.simulation.drafts import Plan, Variant, draft_plans
from vllm_spechub.offline.simulation.study import Sampling
from vllm_spechub.offline.simulation.texts import ModelPair, Roots, sample_roots
from vllm_spechub.rules.acceptance import acceptance
from vllm_spechub.rules.optimum import otm
from vllm_spechub.trees.tree import TokenTree


@dataclass(frozen=True)
class Yardstick:
    """A rule's acceptance at one node and the optimum for its drafts, as means over roots."""

    temperature: float
    rule: str
    # number of children of the node
    children: int
    acceptance: float
    optimum: float
    # number of roots
    roots: int


def small_pairs(
    pair: ModelPair,
    prompts: Sequence[torch.Tensor],
    temperature: float,
    sampling: Sampling,
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both models' distributions at one root of each text, cut down to the `vocab_size` tokens with
    the most mass in both together, and normalised again. [num_roots, vocab_size] float64 each"""
    plan = Plan(Variant("chain"), TokenTree.chain(1))
    targets, drafts = [], []
    for number, prompt in enumerate(prompts):
        generator = torch.Generator(pair.target.device).manual_seed(sampling.seed + number)
        roots: Roots = sample_roots(
            pair, prompt, temperature, min(sampling.texts, 8), sampling.tokens, 1, generator
        )
        if len(roots.text) == 0:
            continue
        drafted = draft_plans(pair, roots, [plan], temperature, sampling.seed)
        targets.append(torch.softmax(drafted.target_logits.double() / temperature, dim=1))
        drafts.append(torch.softmax(drafted.draft_logits.double() / temperature, dim=1))
    p, q = torch.cat(targets), torch.cat(drafts)
    kept = (p + q).topk(min(vocab_size, pair.vocab_size), dim=1).indices
    p, q = p.gather(1, kept), q.gather(1, kept)
    return p / p.sum(dim=1, keepdim=True), q / q.sum(dim=1, keepdim=True)


def run_yardstick(
    pair: ModelPair,
    prompts: Sequence[torch.Tensor],
    variants: Sequence[Variant],
    temperature: float,
    sampling: Sampling,
    vocab_size: int = 8,
    num_children: Sequence[int] = (2, 3),
) -> list[Yardstick]:
    """Compute acceptance and optimum of every rule at the same small distributions.

    Args:
        pair: both models.
        prompts: tokenised prompts. [num_prompt_tokens] each
        variants: the rules.
        temperature: of the target and the draft.
        sampling: how texts are sampled; at most 8 texts per prompt are.
        vocab_size: the number of tokens that are kept, since the optimum is a linear program.
        num_children: how many children the node has, for rules that allow more than one.
    """
    p, q = small_pairs(pair, prompts, temperature, sampling, vocab_size)
    results = []
    for variant in variants:
        most = variant.verification.max_children
        for k in [1] if most == 1 else num_children:
            options = {"sharpening": variant.sharpening}
            accepted = acceptance(p, q, k, variant.rule, **options).node.mean().item()
            best = [otm(*row, k, variant.rule, **options) for row in zip(p, q, strict=True)]
            optimum = sum(best) / len(best)
            results.append(Yardstick(temperature, str(variant), k, accepted, optimum, len(best)))
    return results
