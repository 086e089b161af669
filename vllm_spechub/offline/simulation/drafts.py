# SPDX-License-Identifier: Apache-2.0
"""Draft the trees of many plans below the same roots, with common noise.

Plans share what they have in common: a node is known by its root and its tokens, both models read
it once, and its noise is its own, so rules and shapes that draft a node alike get the same
children, and differences between them are free of most of the noise.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from vllm_spechub.offline.simulation.rows import TreeRows, draft_rows
from vllm_spechub.offline.simulation.texts import ModelPair, Roots
from vllm_spechub.registry import RULES
from vllm_spechub.rules.base import VerificationRule
from vllm_spechub.rules.draft_state import DraftState
from vllm_spechub.rules.grown_trees import grown_trees
from vllm_spechub.rules.kernel_rule import PORTABLE_KERNELS
from vllm_spechub.trees.level_tree import LevelTree
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels.arguments import Drafts, GrownTrees, Requests
from vllm_spechub.triton_kernels.constants import MAX_CHILDREN
from vllm_spechub.triton_kernels.level_allocation import allocate_children

# Products stay below 2^63, node numbers below 2^29, of which the noise takes four each.
HASH_FACTOR, HASH_SIZE = 0x9E3779B1, (1 << 29) - 3
CHUNK = 1 << 22
"""Most elements of a matrix of rows that is worked on at once."""


@dataclass(frozen=True)
class Variant:
    """A rule and the exponent of its sampled children."""

    rule: str
    sharpening: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """ "RULE" or "RULE@SHARPENING".

        Raises:
            ValueError: SHARPENING is no number.
        """
        rule, at, sharpening = text.partition("@")
        try:
            return cls(rule, float(sharpening) if at else 1.0)
        except ValueError:
            raise ValueError(
                f"{text!r}: sharpening is {sharpening!r}, allowed: RULE@SHARPENING with a number "
                "above 0"
            ) from None

    @cached_property
    def verification(self) -> VerificationRule:
        """The rule itself."""
        return RULES.load(self.rule)(self.rule, PORTABLE_KERNELS, self.sharpening)

    def __str__(self) -> str:
        return self.rule if self.sharpening == 1.0 else f"{self.rule}@{self.sharpening:g}"


class Plan(NamedTuple):
    """What to draft and how to verify it."""

    variant: Variant
    tree: TokenTree | LevelTree


class Wanted(NamedTuple):
    """Nodes of a plan that get as many children."""

    plan: Plan
    # [num_rows] each: the nodes' roots, who stands for them, and their first children in the tree
    roots: torch.Tensor
    numbers: torch.Tensor
    first_child: torch.Tensor


class NodeKind(NamedTuple):
    """What decides a node's children, apart from the node."""

    variant: Variant
    num_children: int


@dataclass
class Children:
    """The children of all nodes of one kind."""

    # [num_rows]: the nodes, ascending
    nodes: torch.Tensor
    # [num_rows, num_children]
    tokens: torch.Tensor
    # [num_rows]
    sampled: torch.Tensor

    def rows(
        self,
        # [...]
        nodes: torch.Tensor,
    ) -> torch.Tensor:
        """Where nodes are in these tensors. [...]"""
        return torch.searchsorted(self.nodes, nodes.contiguous())


@dataclass
class DraftedPlans:
    """Drafted trees: every node that is internal in some plan, and the children of each."""

    temperature: float
    # [num_nodes, vocab_size] each: both models' logits, before temperature
    target_logits: torch.Tensor
    draft_logits: torch.Tensor
    # by plan: [num_roots, num_internal], the nodes that stand for the tree's internal ones
    nodes: dict[Plan, torch.Tensor]
    children: dict[NodeKind, Children]
    # by plan of level widths: what each root has made of them
    grown: dict[Plan, GrownTrees]


@torch.inference_mode()
def draft_plans(
    pair: ModelPair, roots: Roots, plans: list[Plan], temperature: float, seed: int
) -> DraftedPlans:
    """Draft every plan's tree below every root.

    Args:
        pair: both models.
        roots: where the trees hang.
        plans: rules with their trees.
        temperature: of the target and the draft; 0 is greedy.
        seed: of the noise; equal seeds give equal trees, whatever the other plans.
    """
    forest = _Forest(pair, roots, plans, temperature, seed)
    while forest.read_level():
        forest.draft_level()
    return DraftedPlans(
        temperature,
        torch.cat(forest.target_logits),
        torch.cat(forest.draft_logits),
        forest.nodes,
        {kind: _join(parts) for kind, parts in forest.children.items()},
        forest.grown,
    )


def _join(parts: list[Children]) -> Children:
    columns = zip(*((part.nodes, part.tokens, part.sampled) for part in parts), strict=True)
    return Children(*(torch.cat(column) for column in columns))


class _Forest:
    """Nodes are numbered level by level, and by root within a level."""

    def __init__(
        self, pair: ModelPair, roots: Roots, plans: list[Plan], temperature: float, seed: int
    ) -> None:
        num_roots, device = len(roots.text), roots.texts.device
        self.readers = TreeRows(pair.target, roots), draft_rows(pair, roots)
        self.plans, self.temperature = plans, temperature
        self.vocab_size, self.num_roots = pair.vocab_size, num_roots
        # One stream per root; a hash of its tokens tells a node from the others of a root, so that
        # trees do not depend on the plans that they are drafted beside.
        self.seeds = (seed << 20) + torch.arange(num_roots, device=device)
        self.temperatures = torch.full((num_roots,), float(temperature), device=device)
        self.depth = 0
        # by node: its root, and its column in what the readers have read
        self.root = torch.arange(num_roots, device=device)
        self.column = torch.zeros_like(self.root)
        self.num_columns = 1
        self.path_hash = torch.zeros_like(self.root)
        # the level's nodes, and what the readers need of them: [num_roots, width]
        self.level = self.root
        self.place = self.column
        self.tokens = roots.texts[roots.text, roots.position].unsqueeze(1)
        self.parents = torch.zeros_like(self.tokens)
        self.target_logits: list[torch.Tensor] = []
        self.draft_logits: list[torch.Tensor] = []
        self.children: dict[NodeKind, list[Children]] = {}
        self.nodes = {
            plan: torch.full((num_roots, len(plan.tree.internal_nodes)), -1, device=device)
            for plan in plans
        }
        for numbers in self.nodes.values():
            numbers[:, 0] = self.level
        self.grown = {
            plan: grown_trees(plan.tree, num_roots, device)
            for plan in plans
            if isinstance(plan.tree, LevelTree)
        }

    def read_level(self) -> bool:
        """Read both models at the level's nodes; False if there are none."""
        if len(self.level) == 0:
            return False
        target, draft = (
            reader.read(self.tokens, self.parents)[self.root[self.level], self.place].float()
            for reader in self.readers
        )
        self.target_logits.append(target)
        self.draft_logits.append(draft)
        return True

    def draft_level(self) -> None:
        """Draft the children of the level's nodes; those that go on are the next level."""
        wanted: dict[NodeKind, list[Wanted]] = {}
        for plan in self.plans:
            if self.depth < plan.tree.depth:
                for count, entry in self._parents(plan):
                    wanted.setdefault(NodeKind(plan.variant, count), []).append(entry)
        keys, places = [], []
        for kind, entries in wanted.items():
            drafted = self._draft(kind, torch.cat([entry.numbers for entry in entries]).unique())
            # Equal siblings, which independent draws can be, are different nodes.
            equal = drafted.tokens.unsqueeze(2) == drafted.tokens.unsqueeze(1)
            twin = equal.tril(-1).sum(dim=2)
            key = (drafted.nodes.unsqueeze(1) * MAX_CHILDREN + twin) * self.vocab_size
            key += drafted.tokens
            for plan, roots, numbers, first_child in entries:
                rows = drafted.rows(numbers)
                internal = torch.from_numpy(plan.tree.internal_index).to(key.device)
                for slot in range(kind.num_children):
                    index = internal[first_child + slot].long()
                    (inner,) = (index >= 0).nonzero(as_tuple=True)
                    if len(inner):
                        keys.append(key[rows[inner], slot])
                        places.append((plan, roots[inner], index[inner]))
        self.depth += 1
        if not keys:
            self.level = self.level[:0]
            return
        unique, inverse = torch.cat(keys).unique(return_inverse=True)
        first = len(self.root)
        sizes = [len(key) for key in keys]
        for (plan, roots, index), number in zip(places, inverse.split(sizes), strict=True):
            self.nodes[plan][roots, index] = first + number

        parent = unique // (self.vocab_size * MAX_CHILDREN)
        root = self.root[parent]
        counts = torch.bincount(root, minlength=self.num_roots)
        self.level = first + torch.arange(len(unique), device=root.device)
        self.place = self.level - first - (counts.cumsum(0) - counts)[root]
        width = int(counts.max())
        self.tokens = root.new_zeros(self.num_roots, width)
        self.tokens[root, self.place] = unique % self.vocab_size
        self.parents = root.new_zeros(self.num_roots, width)
        self.parents[root, self.place] = self.column[parent]
        mixed = self.path_hash[parent] * HASH_FACTOR + unique % (self.vocab_size * MAX_CHILDREN)
        self.path_hash = torch.cat([self.path_hash, (mixed + 1) % HASH_SIZE])
        self.root = torch.cat([self.root, root])
        self.column = torch.cat([self.column, self.num_columns + self.place])
        self.num_columns += width

    def _parents(self, plan: Plan) -> Iterator[tuple[int, Wanted]]:
        """The nodes of this depth that get children, by how many."""
        tree, numbers = plan.tree, self.nodes[plan]
        everyone = torch.arange(self.num_roots, device=numbers.device)
        nodes = tree.internal_levels()[self.depth]
        if isinstance(tree, TokenTree):
            for node in nodes.tolist():
                first = torch.full_like(everyone, int(tree.first_child[node]))
                own = numbers[:, tree.internal_index[node]]
                yield int(tree.num_children[node]), Wanted(plan, everyone, own, first)
            return
        tables = self.grown[plan].tables
        level = numbers[:, nodes]
        allocate_children(
            self.draft_logits[-1][level.flatten() - self.level[0]],
            Requests(everyone, torch.zeros_like(everyone), self.temperatures, self.seeds),
            self.grown[plan],
            first_node=int(nodes[0]),
            width=len(nodes),
            width_below=tree.widths[self.depth],
            rule=plan.variant.rule,
        )
        counts, first = tables.num_children[:, nodes], tables.first_child[:, nodes].long()
        for count in range(1, MAX_CHILDREN + 1):
            roots, place = (counts == count).nonzero(as_tuple=True)
            if len(roots):
                yield count, Wanted(plan, roots, level[roots, place], first[roots, place])

    def _draft(
        self,
        kind: NodeKind,
        # [num_rows], ascending nodes of this level
        nodes: torch.Tensor,
    ) -> Children:
        parts = []
        for chunk in nodes.split(max(1, CHUNK // self.vocab_size)):
            parts.append(self._draft_chunk(kind, chunk))
        children = _join(parts)
        self.children.setdefault(kind, []).append(children)
        return children

    def _draft_chunk(
        self,
        kind: NodeKind,
        # [num_rows]
        nodes: torch.Tensor,
    ) -> Children:
        """Each node is the root of a tree of its own for the rule, but has its own noise."""
        num_rows = len(nodes)
        logits = self.draft_logits[-1][nodes - self.level[0]]
        state = DraftState(
            TokenTree((0,) * kind.num_children),
            torch.zeros(num_rows, kind.num_children, dtype=torch.int64, device=nodes.device),
            Drafts(
                torch.empty_like(logits).unsqueeze(1),
                torch.zeros(num_rows, 1, dtype=torch.int32, device=nodes.device),
            ),
        )
        (level,) = state.levels
        noise = level.all_rows._replace(nodes=self.path_hash[nodes].to(torch.int32))
        requests = Requests(
            torch.arange(num_rows, device=nodes.device),
            torch.zeros_like(nodes),
            self.temperatures[self.root[nodes]],
            self.seeds[self.root[nodes]],
        )
        rule = kind.variant.verification
        rule.sample_children(logits, replace(level, all_rows=noise), requests, state)
        return Children(nodes, state.tokens, state.drafts.sampled[:, 0])
