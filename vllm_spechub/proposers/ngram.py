# SPDX-License-Identifier: Apache-2.0
"""Drafts from the request's own text: what followed when its last tokens stood there before.

Prompt lookup (https://github.com/apoorvumang/prompt-lookup-decoding) drafts one such continuation,
a chain. Here those of several places make a tree, as in SuffixDecoding (arXiv 2411.04975).

Every child is chosen without chance, so it is a hub, whose distribution is a point mass, and any
built-in rule verifies it exactly. No distribution is stored. Hubs must differ from their siblings,
also where the text has nothing to offer: there they are the first tokens of the vocabulary, which
verification accepts with the target's probability for them, as it does all hubs.
"""

from typing import Any, ClassVar, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from vllm.config import ModelConfig

from vllm_spechub.config import SpecHubConfig
from vllm_spechub.proposers.base import DraftStep, TreeProposer
from vllm_spechub.rules.draft_state import DraftState
from vllm_spechub.trees.validation import one_line
from vllm_spechub.triton_kernels.constants import MAX_CHILDREN
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES

NUM_PLACES = 16  # earlier places in the text whose continuations are read
NUM_SPARE = NUM_PLACES + MAX_CHILDREN  # enough where every place has one of them
MOST_TOKENS = 2**24  # of texts that are searched at once, which bounds the memory that it takes
UNUSABLE = -(2**30)
LONGEST = 64


class NgramOptions(BaseModel):
    """The proposer's own keys of `--speculative-config`, which are those of vLLM's method."""

    model_config = ConfigDict(extra="forbid")

    prompt_lookup_max: int = Field(
        5, strict=True, ge=1, le=LONGEST, description=f"a whole number from 1 to {LONGEST}"
    )
    """How many of the last tokens are compared with the text before them. Places where more of
    them agree come first."""
    prompt_lookup_min: int = Field(
        1, strict=True, ge=1, le=LONGEST, description=f"a whole number from 1 to {LONGEST}"
    )
    """How many of the last tokens must agree."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min is {self.prompt_lookup_min}, allowed: at most "
                f"prompt_lookup_max, which is {self.prompt_lookup_max}"
            )
        return self


class Continuations(NamedTuple):
    """What followed the last tokens of each text before, the best place first."""

    # [num_reqs, num_places, depth] int64
    tokens: torch.Tensor
    # [num_reqs, num_places] int32: how many of the last tokens stood before it; 0 for no place
    lengths: torch.Tensor


def find_continuations(
    # [num_reqs, width] int32
    texts: torch.Tensor,
    # [num_reqs] int64, the places of the texts' last tokens
    roots: torch.Tensor,
    depth: int,
    options: NgramOptions,
) -> Continuations:
    """Find the places where most of each text's last tokens, at least `prompt_lookup_min` and at
    most `prompt_lookup_max`, stood before, the most recent of equally long ones first.

    Where a continuation reaches the end of its text, it goes on with itself, as in LZ77.
    """
    width = texts.shape[1]
    places = torch.arange(width, dtype=torch.int32, device=texts.device)
    same = places < roots.unsqueeze(1)
    lengths = torch.zeros_like(texts)
    for back in range(min(options.prompt_lookup_max, width)):
        last = texts.gather(1, (roots - back).clamp(min=0).unsqueeze(1))
        same[:, :back] = False
        same[:, back:] &= texts[:, : width - back] == last
        lengths += same
    ranks = torch.where(lengths >= options.prompt_lookup_min, lengths * width + places, -1)
    ranks, _ = ranks.topk(min(NUM_PLACES, width), dim=1)
    place, period = ranks % width, (roots.unsqueeze(1) - ranks % width).clamp(min=1)
    steps = torch.arange(depth, device=texts.device) % period.unsqueeze(2)
    read = (place.unsqueeze(2) + 1 + steps).clamp(max=width - 1)
    tokens = texts.gather(1, read.flatten(1)).view_as(read)
    return Continuations(tokens.long(), torch.where(ranks >= 0, ranks // width, 0))


def tree_of(found: Continuations, state: DraftState) -> tuple[torch.Tensor, torch.Tensor]:
    """Arrange continuations as a tree.

    A node's children are the next tokens of the continuations that begin with its path: those after
    the longest agreement first, of these the most frequent, then the most recent. Nodes for which
    there is none get tokens of the start of the vocabulary that no continuation has there.

    Returns:
        The nodes' tokens, [num_reqs, num_nodes] int64; and which of them were found, bool.
    """
    tokens, lengths = found
    num_reqs, num_places, max_depth = tokens.shape
    device = tokens.device
    # [num_reqs, num_places, num_places, depth] whether two continuations agree as far as that
    agree = (tokens.unsqueeze(2) == tokens.unsqueeze(1)).to(torch.int8).cummin(-1).values.bool()
    agree &= (lengths > 0)[:, :, None, None] & (lengths > 0)[:, None, :, None]
    equal = (lengths.unsqueeze(2) == lengths.unsqueeze(1)).unsqueeze(-1)
    before = torch.ones(num_places, num_places, dtype=torch.bool, device=device).tril(-1)
    # [num_reqs, num_places, depth] each: the first of those that agree stands for all of them
    first = (lengths > 0).unsqueeze(-1) & ~(agree & before.unsqueeze(-1)).any(dim=2)
    frequency = (agree & equal).sum(dim=2)
    recency = torch.arange(num_places, 0, -1, device=device).unsqueeze(-1) - 1
    scores = (lengths.unsqueeze(-1) * (num_places + 1) + frequency) * num_places + recency
    scores = torch.where(first, scores, UNUSABLE)

    # The children of any node, by its depth and by what stands for it: a continuation, nothing, or
    # the root. [num_reqs, num_places + 2, num_places, depth] which continuations begin with it
    nothing, root = num_places, num_places + 1
    begin = torch.nn.functional.pad(agree, (1, -1, 0, 0, 0, 2))
    begin[:, root] = True
    options = scores.unsqueeze(1).masked_fill(~begin, UNUSABLE)
    # after all continuations, the start of the vocabulary without any of their tokens
    spare = torch.arange(NUM_SPARE, device=device).unsqueeze(-1)
    taken = (tokens.unsqueeze(2) == spare) & (lengths > 0)[:, :, None, None]
    spares = torch.where(taken.any(dim=1), UNUSABLE, -1 - spare)
    options = torch.cat([options, spares.unsqueeze(1).expand(-1, num_places + 2, -1, -1)], dim=2)
    next_tokens = torch.cat([tokens, spare.expand(num_reqs, -1, max_depth)], dim=1)
    # [num_reqs, num_places + 2, max_children, depth]
    best = options.topk(state.tree.max_children, dim=2).indices
    next_tokens = next_tokens.unsqueeze(1).expand(-1, num_places + 2, -1, -1).gather(2, best)
    # [.., 2] a child's token, and what stands for it
    children = torch.stack([next_tokens, best.clamp(max=nothing)], dim=-1)

    # [num_reqs, num_nodes, 2]
    nodes = children.new_empty(num_reqs, state.tree.num_nodes, 2)
    stands = torch.full((num_reqs, 1), root, device=device)
    for depth, level in enumerate(state.levels):
        if depth > 0:
            stands = nodes[:, level.all_rows.column[: len(level.nodes_np)], 1]
        below = children[:, :, : level.max_children, depth]
        drafted = below.gather(1, stands[:, :, None, None].expand(-1, -1, *below.shape[2:]))
        drafted = drafted.flatten(1, 2)
        nodes[:, level.children] = drafted if level.select is None else drafted[:, level.select]
    tree, stands = nodes.unbind(-1)
    return tree, stands < nothing


class NgramProposer(TreeProposer[None]):
    """Drafts what followed the request's last tokens when they stood earlier in its text."""

    vllm_method: ClassVar[str] = "ngram_gpu"
    needs_model: ClassVar[bool] = False
    point_masses: ClassVar[bool] = True
    options: ClassVar[frozenset[str]] = frozenset(NgramOptions.model_fields)

    @classmethod
    def check_options(cls, options: dict[str, Any], target_model_config: ModelConfig) -> None:
        super().check_options(options, target_model_config)
        try:
            NgramOptions.model_validate({k: v for k, v in options.items() if k in cls.options})
        except ValidationError as error:
            raise ValueError(one_line(error, _describe)) from None
        schedule = options.get("tree_by_batch_size")
        trees = [entry[-1] for entry in schedule] if isinstance(schedule, list) else [schedule]
        for key, tree in [
            ("tree", options.get("tree")),
            *(("tree_by_batch_size", tree) for tree in trees),
        ]:
            if isinstance(tree, str) and tree.startswith("auto"):
                raise ValueError(
                    f"speculative_config[{key!r}] is {tree!r}, but nobody has measured acceptance "
                    "with proposer 'ngram'; name a tree, such as 'caterpillar:8:2'"
                )

    @classmethod
    def check_config(cls, config: SpecHubConfig) -> None:
        if config.verification not in BUILTIN_RULES:
            raise ValueError(
                f"speculative_config['verification'] is {config.verification!r}, but proposer "
                f"'ngram' draws nothing; allowed: {', '.join(BUILTIN_RULES)}"
            )
        if config.sharpening != 1:
            raise ValueError(
                f"speculative_config['sharpening'] is {config.sharpening:g}, but proposer 'ngram' "
                "draws nothing; leave it out"
            )

    def read(self, step: DraftStep) -> None:
        """Nothing to prepare: vLLM itself keeps the text up to date."""

    def draft(
        self,
        step: DraftStep,
        carried: None,
        state: DraftState,
        # [max_num_reqs]
        temperature: torch.Tensor,
        # [max_num_reqs]
        seeds: torch.Tensor,
    ) -> None:
        options = NgramOptions(**self.config.proposer_options)
        longest = int(step.batch.seq_lens_cpu_upper_bound[: step.num_reqs].max())
        width = min(longest + 1, self.max_model_len)  # a root comes after what was read
        most = max(1, MOST_TOKENS // width)
        roots = step.root_positions.clamp(max=width - 1)
        # [num_nodes] the last sibling of each: a node of which a child is missing counts as a leaf
        parents = state.tables.parents[1:]
        last_sibling = state.tables.first_child[parents] + state.tables.num_children[parents] - 1
        useful = []
        for reqs, rows, last in zip(
            step.batch.idx_mapping.split(most),
            step.draft_rows.split(most),
            roots.split(most),
            strict=True,
        ):
            texts = self.req_states.all_token_ids.gpu[reqs, :width]
            continuations = find_continuations(texts, last, state.tree.depth, options)
            tree, found = tree_of(continuations, state)
            state.tokens[rows] = tree
            state.drafts.sampled[rows] = 0
            useful.append((last_sibling * found).amax(dim=1))
        self.num_useful_nodes = torch.cat(useful)


def _describe(where: tuple[int | str, ...]) -> tuple[str, str | None]:
    """What `one_line` asks about an option; an error about several names them itself."""
    if not where:
        return "speculative_config", None
    name = str(where[0])
    return f"speculative_config[{name!r}]", NgramOptions.model_fields[name].description
