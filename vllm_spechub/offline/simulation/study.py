# SPDX-License-Identifier: Apache-2.0
"""Measure plans on sampled texts: rates by slot, the best shapes, tokens per step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from vllm_spechub.offline.simulation.drafts import Plan, Variant, draft_plans
from vllm_spechub.offline.simulation.reach import reach
from vllm_spechub.offline.simulation.texts import ModelPair, Roots, sample_roots
from vllm_spechub.trees.best_tree import Rates, best_shape
from vllm_spechub.trees.level_tree import LevelTree
from vllm_spechub.trees.tree import TokenTree

BASELINES = ("rrs", "rrsw", "ordered")
PROBE_DEPTH = {2: 4, 3: 3, 4: 2}
"""By k: the depth of the complete tree on which nodes with k children are measured."""
MAX_ELEMENTS = 1 << 27
"""About the most logits that are kept for one batch of roots."""
NODES_PER_ROOT = 256
"""How many nodes per root we expect all plans together to have."""

Progress = Callable[[str, int, int], None]
"""A function that is called with what is measured, how many prompts are done, and how many there
are."""


@dataclass(frozen=True)
class Sampling:
    """How texts are sampled from the target, and roots are chosen in them."""

    # number of texts per prompt
    texts: int = 40
    # number of sampled tokens and of roots per text
    tokens: int = 48
    roots: int = 4
    max_prompt_tokens: int = 256
    seed: int = 0


@dataclass
class Measured:
    """One plan's expected tokens per step at every root."""

    # [num_roots] each: tokens per step, and the number of the root's prompt
    tokens: np.ndarray
    prompts: np.ndarray
    # [num_nodes + 1]: the mean probability that a node is accepted, 1 for the root
    reach: np.ndarray


def measure(
    pair: ModelPair,
    prompts: Sequence[torch.Tensor],
    plans: Sequence[Plan],
    temperature: float,
    sampling: Sampling,
    phase: int = 0,
    progress: Progress | None = None,
    label: str = "",
) -> dict[Plan, Measured]:
    """Measure the tokens per step of every plan at the same roots, with common noise.

    Args:
        pair: both models.
        prompts: tokenised prompts. [num_prompt_tokens] each
        plans: rules with their trees.
        temperature: of the target and the draft.
        sampling: how many texts and roots.
        phase: texts of different phases are independent.
        progress: called after every prompt.
        label: what `progress` is told that is measured.

    Raises:
        ValueError: every sampled text ended before a root.
    """
    plans = list(dict.fromkeys(plans))
    tokens: dict[Plan, list[np.ndarray]] = {plan: [] for plan in plans}
    reached: dict[Plan, list[np.ndarray]] = {plan: [] for plan in plans}
    of_prompt: list[np.ndarray] = []
    batch = max(1, min(64, MAX_ELEMENTS // (pair.vocab_size * NODES_PER_ROOT)))
    device = pair.target.device
    for number, prompt in enumerate(prompts):
        generator = torch.Generator(device).manual_seed(
            (sampling.seed * 4096 + number) * 64 + phase
        )
        all_roots = sample_roots(
            pair, prompt, temperature, sampling.texts, sampling.tokens, sampling.roots, generator
        )
        for start in range(0, len(all_roots.text), batch):
            chunk = slice(start, start + batch)
            used, text = all_roots.text[chunk].unique(return_inverse=True)
            roots = Roots(all_roots.texts[used], text, all_roots.position[chunk])
            seed = int(torch.randint(1 << 40, (), generator=generator, device=device))
            drafted = draft_plans(pair, roots, plans, temperature, seed)
            for plan in plans:
                values = reach(drafted, plan).double().cpu().numpy()
                tokens[plan].append(values.sum(axis=1))
                reached[plan].append(values.sum(axis=0))
            of_prompt.append(np.full(len(text), number))
        if progress:
            progress(label, number + 1, len(prompts))
    if not of_prompt:
        raise ValueError("every sampled text ended before a root: nothing to measure")
    numbers = np.concatenate(of_prompt)
    return {
        plan: Measured(
            np.concatenate(tokens[plan]), numbers, np.sum(reached[plan], axis=0) / len(numbers)
        )
        for plan in plans
    }


def best_kind(max_depth: int) -> str:
    """The `kind` of rows that measure a rule's own best shape of at most this depth."""
    return f"best, depth <= {max_depth}"


def probe_plans(variant: Variant, max_depth: int) -> list[Plan]:
    """Complete trees whose nodes have 1, 2, 3 and 4 children, as far as the rule allows them."""
    return [Plan(variant, TokenTree.chain(max_depth))] + [
        Plan(variant, TokenTree.complete(k, min(depth, max_depth)))
        for k, depth in PROBE_DEPTH.items()
        if k <= variant.verification.max_children
    ]


def slot_rates(measured: dict[Plan, Measured], variant: Variant, max_depth: int) -> Rates:
    """`rates[k][slot]`: of the steps that reach a node with k children, the share that accept the
    child in that slot, pooled over the nodes of the probe trees.

    `traversal` accepts a child more often the larger the child's subtree is, so its rates hold for
    subtrees like those of the probe trees.
    """
    rates = {}
    for plan in probe_plans(variant, max_depth):
        tree, reach = plan.tree, measured[plan].reach
        assert isinstance(tree, TokenTree)
        k = int(tree.num_children[0])
        first = tree.first_child[tree.internal_nodes]
        reached = reach[tree.internal_nodes].sum()
        rates[k] = [float(reach[first + slot].sum() / reached) for slot in range(k)]
    return rates


@dataclass(frozen=True)
class Row:
    """One plan's tokens per step, with the half width of its 95% confidence interval."""

    temperature: float
    # the largest number of drafted nodes
    budget: int
    # "complete", or what `best_kind` returns
    kind: str
    rule: str
    # of the tree: drafted nodes, and depth
    nodes: int
    depth: int
    tokens_per_step: float
    ci: float
    # how many were measured
    roots: int
    prompts: int
    # the tree's parents
    tree: tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """One rule's tokens per step less another's, at the same roots with the same noise."""

    temperature: float
    budget: int
    kind: str
    rule: str
    baseline: str
    difference: float
    ci: float


@dataclass
class Study:
    """What `simulate` measured."""

    rows: list[Row] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    # by rule and temperature
    rates: dict[str, dict[str, Rates]] = field(default_factory=dict)


def complete_tree(variant: Variant, budget: int) -> TokenTree:
    """The largest complete binary tree with at most `budget` drafted nodes; for rules that allow
    one child per node, the chain of the same depth."""
    depth = max(1, (budget + 2).bit_length() - 2)
    return TokenTree.complete(min(2, variant.verification.max_children), depth)


def mean_and_ci(
    # [num_roots]
    values: np.ndarray,
    # [num_roots]
    clusters: np.ndarray,
) -> tuple[float, float]:
    """The mean and the half width of its 95% confidence interval.

    Roots of one prompt are not independent, so the interval is Student's t over prompts, which are
    the clusters; it is NaN with fewer than two.
    """
    from scipy.stats import t

    mean = float(values.mean())
    totals = np.bincount(clusters, weights=values - mean)[np.unique(clusters)]
    groups = len(totals)
    if groups < 2:
        return mean, float("nan")
    error = np.sqrt(groups / (groups - 1) * (totals**2).sum()) / len(values)
    return mean, float(t.ppf(0.975, groups - 1) * error)


def measure_rates(
    pair: ModelPair,
    prompts: Sequence[torch.Tensor],
    variants: Sequence[Variant],
    temperature: float,
    sampling: Sampling,
    max_depth: int,
    progress: Progress | None = None,
) -> dict[Variant, Rates]:
    """Measure the acceptance by slot of every rule. Arguments as `measure`.

    Args:
        max_depth: the largest depth of the probe trees.
    """
    probes = [plan for variant in variants for plan in probe_plans(variant, max_depth)]
    label = f"T={temperature:g}: acceptance by slot"
    measured = measure(pair, prompts, probes, temperature, sampling, 1, progress, label)
    return {variant: slot_rates(measured, variant, max_depth) for variant in variants}


def pick_tree(
    pair: ModelPair,
    prompts: Sequence[torch.Tensor],
    variant: Variant,
    trees: Sequence[TokenTree | LevelTree],
    temperatures: Sequence[float],
    sampling: Sampling,
    progress: Progress | None = None,
    duration: Callable[[TokenTree | LevelTree], float] = lambda tree: 1.0,
) -> tuple[TokenTree | LevelTree, float]:
    """Simulate trees with one rule.

    Args:
        duration: of a step with a tree, in any unit.

    Returns:
        The tree with the most tokens per unit of time, and its tokens per step, both on average
        over the temperatures.
    """
    plans = [Plan(variant, tree) for tree in trees]
    tokens = dict.fromkeys(plans, 0.0)
    for temperature in temperatures:
        label = f"T={temperature:g}: tokens per step"
        found = measure(pair, prompts, plans, temperature, sampling, 2, progress, label)
        for plan in tokens:
            tokens[plan] += float(found[plan].tokens.mean()) / len(temperatures)
    best = max(tokens, key=lambda plan: tokens[plan] / duration(plan.tree))
    return best.tree, tokens[best]


def run_study(
    pair: ModelPair,
    prompts: Sequence[torch.Tensor],
    variants: Sequence[Variant],
    temperatures: Sequence[float],
    budgets: Sequence[int],
    max_depths: Sequence[int],
    sampling: Sampling,
    progress: Progress | None = None,
) -> Study:
    """Measure the tokens per step of every rule on complete trees and on its own best shapes.

    The candidates for a best shape are the shapes that dynamic programming finds for any rule's
    rates, and the complete tree. For each largest depth, a rule gets the candidate with the most
    tokens per step in a simulation; what is reported is then measured on new texts.

    Args:
        budgets: the largest numbers of drafted nodes.
        max_depths: the largest depths of the best shapes.
    """
    study = Study()
    trial = replace(sampling, texts=max(1, sampling.texts // 4))
    for temperature in temperatures:
        rates = measure_rates(
            pair, prompts, variants, temperature, trial, max(max_depths), progress
        )
        for variant in variants:
            study.rates.setdefault(str(variant), {})[f"{temperature:g}"] = rates[variant]

        candidates = {
            (variant, budget, best_kind(max_depth)): _candidates(variant, budget, rates, max_depth)
            for variant in variants
            for budget in budgets
            for max_depth in max_depths
        }
        plans = [Plan(key[0], tree) for key, trees in candidates.items() for tree in trees]
        label = f"T={temperature:g}: choosing shapes"
        tried = measure(pair, prompts, plans, temperature, trial, 2, progress, label)
        chosen = {}
        for (variant, budget, kind), trees in candidates.items():
            chosen[variant, budget, "complete"] = Plan(variant, complete_tree(variant, budget))
            chosen[variant, budget, kind] = max(
                (Plan(variant, tree) for tree in trees), key=lambda plan: tried[plan].tokens.mean()
            )

        label = f"T={temperature:g}: tokens per step"
        final = measure(
            pair, prompts, list(chosen.values()), temperature, sampling, 3, progress, label
        )
        for (variant, budget, kind), plan in chosen.items():
            mean, ci = mean_and_ci(final[plan].tokens, final[plan].prompts)
            study.rows.append(
                Row(
                    temperature,
                    budget,
                    kind,
                    str(variant),
                    plan.tree.num_nodes,
                    plan.tree.depth,
                    mean,
                    ci,
                    len(final[plan].tokens),
                    len(np.unique(final[plan].prompts)),
                    plan.tree.parents,
                )
            )
            for baseline in variants:
                if str(baseline) not in BASELINES or baseline == variant:
                    continue
                other = final[chosen[baseline, budget, kind]]
                study.differences.append(
                    Difference(
                        temperature,
                        budget,
                        kind,
                        str(variant),
                        str(baseline),
                        *mean_and_ci(final[plan].tokens - other.tokens, other.prompts),
                    )
                )
    return study


def _candidates(
    variant: Variant, budget: int, rates: dict[Variant, Rates], max_depth: int
) -> list[TokenTree]:
    """The trees from which the best shape of a rule is chosen."""
    most = variant.verification.max_children
    if most == 1:
        return [best_shape(rates[variant], budget, max_depth).tree]
    # Rates of rules for chains only would make chains.
    trees = [
        best_shape({k: slots for k, slots in by_slot.items() if k <= most}, budget, max_depth).tree
        for other, by_slot in rates.items()
        if other.verification.max_children > 1
    ]
    complete = complete_tree(variant, budget)
    if complete.depth <= max_depth:
        trees.append(complete)
    return list(dict.fromkeys(trees))
