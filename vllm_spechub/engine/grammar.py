# SPDX-License-Identifier: Apache-2.0
"""Structured outputs over trees: one mask per node, by walking the grammar down and up the tree.

A node's mask is the one that plain decoding would have applied after the node's path. The tokens of
a path are fed one at a time, as in plain decoding, so a reasoning parser may switch the grammar on
at any node.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from vllm.v1.structured_output.utils import strip_speculative_padding

from vllm_spechub.trees.tree import TokenTree

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager
    from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
    from vllm.v1.structured_output.request import StructuredOutputRequest

ANY_TREE = TokenTree.chain(1)
"""Stands for the tree of a request without drafts, of which only the root is used."""
UNCONSTRAINED = -1
"""The 32-bit word of a mask that allows all its 32 tokens."""


class MaskFormat(NamedTuple):
    """The grammar masks that vLLM's model runner takes."""

    # whether each request has a mask for every node that a tree may have, instead of one for each
    # that it has drafted
    fixed_rows: bool
    # the tokens that a request must not emit while it still reasons
    masked_while_reasoning: "Callable[[StructuredOutputManager, Request], tuple[int, ...]]"


@dataclass
class History:
    """What vLLM's reasoning check reads of a request, up to one of its tokens or a tree's node."""

    request_id: str
    structured_output_request: "StructuredOutputRequest"
    prompt_token_ids: list[int] | None
    all_token_ids: list[int] = field(default_factory=list)
    use_structured_output: bool = True

    @classmethod
    def at_length(cls, request: "Request", length: int) -> "History":
        """The request as it was when it had `length` tokens."""
        return cls(
            request.request_id,
            structured_output_of(request),
            request.prompt_token_ids,
            request.all_token_ids[:length],
        )


def structured_output_of(request: "Request") -> "StructuredOutputRequest":
    """The structured output that a request asks for; the request must ask for one."""
    assert request.structured_output_request is not None
    return request.structured_output_request


def is_masked(manager: "StructuredOutputManager", request: "Request") -> bool:
    """Whether the grammar applies to the request's next token, because reasoning is over."""
    return manager._get_constraint_bounds(request, ()).constraint_start == 0


class GrammarWalk:
    """A request's grammar and reasoning parser at one node, the root at first.

    Args:
        manager: vLLM's structured output manager, which knows when reasoning ends.
        request: a request whose grammar is compiled and fed with all its tokens.
        masked_while_reasoning: as in `MaskFormat`.
    """

    def __init__(
        self,
        manager: "StructuredOutputManager",
        request: "Request",
        masked_while_reasoning: "Callable[[StructuredOutputManager, Request], tuple[int, ...]]",
    ) -> None:
        self.manager = manager
        self.request_id = request.request_id
        # vLLM schedules a request only after its grammar is compiled.
        self.grammar = cast("StructuredOutputGrammar", structured_output_of(request).grammar)
        # Whether the grammar applies at this node. It does not while the model still reasons.
        self.masks = is_masked(manager, request)
        self.history = History.at_length(request, 0 if self.masks else request.num_tokens)
        # The tokens that are masked where the grammar does not apply.
        self.masked_ids = () if self.masks else masked_while_reasoning(manager, request)

    @contextmanager
    def step(self, token: int) -> Iterator[bool]:
        """Go down to the child with this token, and up again at the end of the block.

        Yields whether a mask may be needed at or below the child: not below a token that the
        grammar refuses, as it is never emitted, nor below one that ends the grammar.
        """
        if self.masks:
            with self._feed(token) as goes_on:
                yield goes_on
            return
        self.history.all_token_ids.append(token)
        start, constraint_start = self.manager._get_constraint_bounds(
            cast("Request", self.history), [token], spec_tokens_committed=True
        )
        self.masks = constraint_start <= 1
        if start == 0:  # the token that ends the reasoning belongs to the grammar
            with self._feed(token) as goes_on:
                yield goes_on
        else:
            yield True
        self.masks = False
        self.history.all_token_ids.pop()

    @contextmanager
    def _feed(self, token: int) -> Iterator[bool]:
        grammar = self.grammar
        # Validated first: vLLM logs a failing accept as an error, and one backend stays broken.
        fed = (
            not grammar.is_terminated()
            and bool(grammar.validate_tokens([token]))
            and grammar.accept_tokens(self.request_id, [token])
        )
        yield fed and not grammar.is_terminated()
        if fed:
            grammar.rollback(1)


def fill_tree_bitmask(
    walk: GrammarWalk,
    tree: TokenTree,
    tokens: Sequence[int],
    # [at least 1 + len(tokens), ceil(vocab_size / 32)] int32, the root's row first
    bitmask: "torch.Tensor",
) -> None:
    """Fill the mask of the root and of every drafted node, by a depth-first walk.

    Args:
        walk: stands at the root, and stands there again afterwards.
        tree: the tree that was drafted.
        tokens: the drafted nodes' tokens in breadth-first order; fewer than the tree has nodes if
            it was truncated, none if they are not known.
        bitmask: bit t of a row is set if token t may follow the row's node. Rows that nothing
            constrains, and rows that cannot be reached, allow everything.
    """
    bitmask.fill_(UNCONSTRAINED)

    def visit(node: int) -> None:
        if not walk.masks:
            row = bitmask[node].numpy().view(np.uint32)
            for token in walk.masked_ids:
                row[token >> 5] &= ~np.uint32(1 << (token & 31))
        elif not walk.grammar.is_terminated():
            walk.grammar.fill_bitmask(bitmask, node)
        first = int(tree.first_child[node])
        last = min(first + int(tree.num_children[node]) - 1, len(tokens))
        for child in range(first, last + 1):
            with walk.step(tokens[child - 1]) as goes_on:
                if goes_on:
                    visit(child)

    visit(0)


def grammar_bitmask(
    manager: "StructuredOutputManager",
    requests: "dict[str, Request]",
    request_ids: list[str],
    drafts: dict[str, list[int]],
    trees: dict[str, TokenTree],
    mask_format: MaskFormat,
) -> "npt.NDArray[np.int32]":
    """Fill the masks of a batch, one per root and drafted node, each request's in node order.

    Args:
        manager: vLLM's structured output manager.
        requests: the scheduler's requests by id.
        request_ids: the requests with a grammar, in the masks' order.
        drafts: each request's scheduled drafts, -1 for those that are not known here.
        trees: the tree that each request's drafts belong to.

    Returns:
        [num_masks, ceil(vocab_size / 32)] int32, as `fill_tree_bitmask` fills each request's rows.
    """
    bitmask, config = manager._grammar_bitmask, manager.vllm_config
    most_rows = 1 + config.num_speculative_tokens
    if bitmask is None:
        assert manager.backend is not None  # it has compiled a grammar
        rows = config.scheduler_config.max_num_seqs * most_rows
        bitmask = manager._grammar_bitmask = manager.backend.allocate_token_bitmask(rows)
    end = 0
    for request_id in request_ids:
        tokens = drafts.get(request_id, [])
        start, end = end, end + (most_rows if mask_format.fixed_rows else 1 + len(tokens))
        fill_tree_bitmask(
            GrammarWalk(manager, requests[request_id], mask_format.masked_while_reasoning),
            trees.get(request_id, ANY_TREE),
            strip_speculative_padding(tokens),
            bitmask[start:end],
        )
    return bitmask[:end].numpy()


def unseen_drafts(
    scheduler_output: "SchedulerOutput", grammar_output: "GrammarOutput"
) -> dict[str, int]:
    """The number of drafts of each request whose drafts the scheduler did not know when it filled
    the masks.

    A request that starts in this step is left out: its drafts are only padding.
    """
    drafts = scheduler_output.scheduled_spec_decode_tokens
    starting = {request.req_id for request in scheduler_output.scheduled_new_reqs}
    starting |= scheduler_output.scheduled_cached_reqs.resumed_req_ids
    known = zip(
        grammar_output.structured_output_request_ids,
        grammar_output.num_acceptable_drafts or [],
        strict=True,
    )
    return {
        request_id: len(drafts[request_id])
        for request_id, num_known in known
        if num_known == 0 and request_id in drafts and request_id not in starting
    }


def accept_tokens(
    accept: "Callable[[StructuredOutputManager, Any, list[int]], bool]",
    manager: "StructuredOutputManager",
    request: "Request",
    token_ids: Sequence[int],
) -> bool:
    """Feed a step's emitted tokens to the grammar as plain decoding does, one at a time.

    Args:
        accept: vLLM's `StructuredOutputManager.accept_tokens`, to which a `History` is a request.
        token_ids: the last tokens of `request`. A reasoning parser is asked about each of them
            with those before it only, and a grammar may end before the last of them.

    Returns:
        False if the grammar refuses one.
    """
    if is_masked(manager, request):
        return all(accept(manager, request, [token]) for token in token_ids)
    past = History.at_length(request, request.num_tokens - len(token_ids))
    for token in token_ids:
        past.all_token_ids.append(token)
        if not accept(manager, past, [token]):
            return False
    return True
