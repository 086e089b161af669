# SPDX-License-Identifier: Apache-2.0
"""`TreeProposer`, the base class of what drafts a tree for every request, level by level.

A proposer is a speculator of vLLM's V2 runner. The base class looks up which tree a step drafts,
runs the loop over the tree's levels, applies sampling parameters to the draft's rows of logits, and
lets the verification rule draw every child. A subclass computes the rows: with a model of its own
(`vllm_spechub.proposers.model_proposer`), from the target's hidden states, or without any model.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch.utils._pytree import tree_map_only
from vllm.config import CUDAGraphMode, ModelConfig, VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.states import SamplingStates
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator
from vllm.v1.worker.gpu.states import RequestState

from vllm_spechub.config import VLLM_KEYS, SpecHubConfig, spechub_config
from vllm_spechub.drafts.alone import check_folder
from vllm_spechub.engine.model_state import TreeModelState
from vllm_spechub.engine.request_trees import RequestTrees
from vllm_spechub.engine.truncation import truncate, truncates
from vllm_spechub.rules.base import VerificationRule
from vllm_spechub.rules.draft_state import DraftBuffers, DraftLevel, DraftState
from vllm_spechub.triton_kernels.arguments import Requests

Carried = TypeVar("Carried")
"""What a proposer hands from one level to the next, such as hidden states."""

ALIGNED = 16
OF_REQUESTS = (
    "idx_mapping",
    "idx_mapping_np",
    "num_scheduled_tokens",
    "num_draft_tokens_per_req",
    "seq_lens",
    "seq_lens_cpu_upper_bound",
    "is_prefilling_np",
)
"""The batch's fields with an entry for each request that a part of a step has for its own."""
BOUNDS_OF_REQUESTS = ("query_start_loc", "query_start_loc_np", "cu_num_logits", "cu_num_logits_np")
"""Those with one more entry, each request's first token or row in the whole batch."""


@dataclass(frozen=True)
class DraftStep:
    """One step as a proposer sees it: the target has run, and its tokens are accepted."""

    batch: InputBatch
    # [num_reqs] int64, the sequence position of each request's first token in the batch
    first_positions: torch.Tensor
    # [num_reqs] int64, the sequence position of the root of the tree that is to be drafted
    root_positions: torch.Tensor
    # [num_reqs] int32, how many of each request's last tokens verification rejected
    num_rejected: torch.Tensor
    # [num_tokens_after_padding, hidden_size], the target's: of every token in the batch, rejected
    # nodes included, in the batch's order
    hidden_states: torch.Tensor
    # one such tensor for each layer that vLLM collects for `vllm_method`; None for most methods
    aux_hidden_states: list[torch.Tensor] | None
    # [num_reqs, depth + 1] int32, the accepted node of each depth, 0 first, -1 past the end; None
    # if no request of the batch had a tree
    accepted_paths: torch.Tensor | None
    # whether this is a trial without requests, of which nothing may be remembered
    dummy_run: bool
    # whether it is a dummy run before there is a KV cache
    skip_attn: bool
    # whether a CUDA graph is being captured of the step, which will be replayed with other contents
    # of the tensors here, up to any length of text
    captured: bool = False
    # where the first request stands in the batch that the target has read
    first_req: int = 0
    # [num_reqs] int64, the row of each request's draft; its state's index, unless rows are given
    draft_rows: torch.Tensor = field(kw_only=True)

    @property
    def num_reqs(self) -> int:
        return self.batch.num_reqs

    def part(self, first: int, last: int) -> "DraftStep":
        """The step for the requests `first` to `last - 1` only. Hidden states, tokens and positions
        stay those of the whole batch, where `query_start_loc` says which are a request's."""
        batch, requests, bounds = self.batch, slice(first, last), slice(first, last + 1)
        of_requests = {name: getattr(batch, name) for name in OF_REQUESTS}
        of_bounds = {name: getattr(batch, name)[bounds] for name in BOUNDS_OF_REQUESTS}
        of_requests = {n: v if v is None else v[requests] for n, v in of_requests.items()}
        paths = self.accepted_paths
        return replace(
            self,
            batch=replace(batch, num_reqs=last - first, **of_requests, **of_bounds),
            first_positions=self.first_positions[requests],
            root_positions=self.root_positions[requests],
            num_rejected=self.num_rejected[requests],
            accepted_paths=None if paths is None else paths[requests],
            first_req=self.first_req + first,
            draft_rows=self.draft_rows[requests],
        )


def _rows_of(carried: Carried, requests: slice) -> Carried:
    """What `read` returned for some of a step's requests."""
    return tree_map_only(torch.Tensor, itemgetter(requests), carried)


class TreeProposer(BaseSpeculator, Generic[Carried]):
    """Drafts one tree per request and step.

    A subclass implements `read`, and `level_logits` or `draft`.

    Attributes:
        vllm_method: the speculative method in vLLM's configuration. It decides what vLLM prepares:
            slots for drafts in the KV cache, auxiliary hidden states, the draft's configuration.
        options: keys of `--speculative-config` beyond the common ones that this proposer reads;
            their values are in `config.proposer_options`.
        needs_model: whether the option `model` names something to load.
        follows_levels: whether it drafts a `LevelTree`: `level_logits` takes a level's ancestors
            and parents from `level.rows`, and nothing from `state.tree` but its sizes.
        point_masses: whether every child is chosen without chance, so that verification needs no
            distribution. All children are then hubs: siblings must differ.
        draft_logits: what was drafted. vLLM passes this attribute to the rejection sampler.
        num_useful_nodes: for each request of the batch that was drafted last, [num_reqs], how many
            of its first nodes are worth verifying; None for all. Synchronous scheduling leaves out
            the others.
        drafted_parents: of the batch that was drafted last, if a `LevelTree` was drafted and some
            request has a grammar: each node's parent, [num_reqs, num_nodes + 1] int32 on the host
            as soon as the drafts are.
        request_trees: what the worker remembers of each request's drafts; set by `bind`.
        sampling_states: each request's sampling parameters; set by `bind`.
        req_states: each request's tokens (`all_token_ids`) and length; set by `bind`.

    Args:
        vllm_config: the engine's configuration.
        device: where the target runs.
        rule: the verification rule, which draws the children.
    """

    vllm_method: ClassVar[str] = "draft_model"
    options: ClassVar[frozenset[str]] = frozenset()
    needs_model: ClassVar[bool] = True
    follows_levels: ClassVar[bool] = False
    point_masses: ClassVar[bool] = False

    supports_mm_inputs: bool = False
    draft_logits: DraftBuffers
    num_useful_nodes: torch.Tensor | None = None
    drafted_parents: torch.Tensor | None = None
    request_trees: RequestTrees
    sampling_states: SamplingStates
    req_states: RequestState

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, rule: VerificationRule
    ) -> None:
        self.vllm_config = vllm_config
        self.config = spechub_config(vllm_config)
        self.schedule = self.config.schedule
        self.device = device
        self.rule = rule
        self.max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        self.vocab_size = vllm_config.model_config.get_vocab_size()
        # A wider pass is one that vLLM has compiled nothing for; more rows of logits are too large.
        self.max_rows = min(
            vllm_config.scheduler_config.max_num_batched_tokens,
            get_max_chunk_logits(self.vocab_size),
        )
        self.draft_logits = DraftBuffers(
            self.schedule.most_requests(self.max_num_reqs),
            self.max_num_reqs,
            self.vocab_size,
            self.logits_dtype(),
            device,
            self.point_masses,
        )

    @property
    def max_model_len(self) -> int:
        """The length of the longest text. vLLM may shorten it to what the KV cache holds."""
        return self.vllm_config.model_config.max_model_len

    @max_model_len.setter
    def max_model_len(self, length: int) -> None:
        """Do nothing: vLLM's own speculators may set what is the configuration's."""

    @classmethod
    def check_options(cls, options: dict[str, Any], target_model_config: ModelConfig) -> None:
        """Check the user's options before the draft's configuration is read.

        Raises:
            ValueError: one line that names the key and what is needed.
        """
        model = options.get("model")
        if not cls.needs_model:
            for key in VLLM_KEYS:
                if options.get(key) is not None:
                    raise ValueError(
                        f"speculative_config[{key!r}] is {options[key]!r}, but proposer "
                        f"{options.get('proposer')!r} loads no model; leave it out"
                    )
            return
        if not model:
            raise ValueError(
                "speculative_config['model'] is missing: name the draft model, a folder or a "
                "Hugging Face id (--spec-model DRAFT)"
            )
        check_folder("speculative_config['model']", model)

    @classmethod
    def own_options(
        cls, options: dict[str, Any], target_model_config: ModelConfig
    ) -> dict[str, Any]:
        """Those of the user's options that the proposer declares itself, settled.

        Raises:
            ValueError: one line that names the key and what is needed.
        """
        return {key: options[key] for key in sorted(cls.options) if key in options}

    @classmethod
    def vllm_options(cls, target_model_config: ModelConfig) -> dict[str, Any]:
        """Options of vLLM's own speculative configuration that the proposer sets itself."""
        return {}

    @classmethod
    def check_config(cls, config: SpecHubConfig) -> None:
        """Check the finished configuration, before any weights are loaded.

        Raises:
            ValueError: one line that names the key and what is needed.
        """

    def logits_dtype(self) -> torch.dtype:
        """The dtype of the rows that `level_logits` returns, which they are also stored in."""
        return torch.float32

    def bind(self, model_state: TreeModelState) -> None:
        """Take what is known about requests. The worker calls this once the target is loaded."""
        self.request_trees = model_state.request_trees
        model_state.layout.nodes.bind(self.draft_logits)
        self.sampling_states = model_state.sampling_states
        self.req_states = model_state.req_states

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Prepare CUDA graphs, if the proposer has any. vLLM calls it when KV caches are known."""

    def capture(self) -> None:
        """Capture the CUDA graphs that `init_cudagraph_manager` prepared, if any."""

    def may_pause(self, batch: InputBatch) -> bool:
        """Whether `read` may be postponed in a step that drafts nothing.

        Such a step adds to `request_trees.draft_lag`. A proposer that reads something which is gone
        after the step, such as hidden states, must never pause.
        """
        return False

    @abstractmethod
    def read(self, step: DraftStep) -> Carried:
        """Process the tokens that the step accepted.

        It is called in every step, even in one that drafts no tree, unless `may_pause` allows
        postponing it.

        Returns:
            What `level_logits` needs for the roots: a tensor, tuple or dict of tensors that have a
            row for each request. A large batch drafts its requests part by part.
        """

    def level_logits(
        self, step: DraftStep, depth: int, level: DraftLevel, state: DraftState, carried: Carried
    ) -> tuple[torch.Tensor, Carried]:
        """Compute the draft's logits at the internal nodes of one depth.

        Args:
            step: the step that drafts, or the part of it that some of its requests are.
            depth: 0 for the roots.
            level: the nodes; `level.rows(step.num_reqs)` lays them out for the batch.
            state: holds the tokens drafted so far; `node_tokens` picks those of a level.
            carried: what `read` or the level above returned.

        Returns:
            Logits before temperature, [num_reqs * num_expanded, vocab_size of the target], a
            request's nodes side by side, -inf where a token must not be drafted; the caller
            overwrites them. And what the next level needs.
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither level_logits nor draft")

    def node_tokens(
        self, step: DraftStep, depth: int, level: DraftLevel, state: DraftState
    ) -> torch.Tensor:
        """The tokens of a level's nodes, [num_reqs * num_expanded] int64.

        At depth 0 these are the roots: each request's last token, or the first one of its prompt
        that the target has not read yet.
        """
        if depth == 0:
            positions = step.root_positions.clamp(max=self.max_model_len - 1)
            return self.req_states.all_token_ids.gpu[step.batch.idx_mapping, positions].long()
        return state.tokens[step.draft_rows.unsqueeze(1), level.columns].flatten()

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        # [num_tokens_after_padding, hidden_size]
        last_hidden_states: torch.Tensor,
        # each [num_tokens_after_padding, hidden_size]
        aux_hidden_states: list[torch.Tensor] | None,
        # [num_reqs]
        num_sampled: torch.Tensor,
        # [num_reqs]
        num_rejected: torch.Tensor,
        # [max_num_reqs, 1]
        last_sampled: torch.Tensor,
        # [num_prefill_lookahead, max_num_reqs]
        next_prefill_tokens: torch.Tensor,
        # [max_num_reqs]
        temperature: torch.Tensor,
        # [max_num_reqs]
        seeds: torch.Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Draft one tree per request. The arguments are those of vLLM's `BaseSpeculator.propose`.

        Args:
            num_speculative_tokens: the number of nodes of the tree to draft, which is one of the
                schedule's; 0 for no tree; None for the largest.

        Returns:
            Tokens [num_reqs, num_nodes of the largest tree], the drafted tree's first, in node
            order.
        """
        self.num_useful_nodes = self.drafted_parents = None
        batch, reqs = input_batch, input_batch.idx_mapping_np
        trees: Sequence[int] = range(len(self.draft_logits.states))  # a trial drafts them all
        if num_speculative_tokens is not None:
            index = self.schedule.index(num_speculative_tokens)
            trees = () if index is None else (index,)
        if not trees and self.may_pause(batch):
            self.request_trees.pause_reading(reqs)
            return self._nothing(batch.num_reqs)
        if len(trees) == 1 and not dummy_run:
            drafted = self.replay_step(
                batch,
                trees[0],
                num_rejected,
                last_hidden_states,
                aux_hidden_states,
                temperature,
                seeds,
            )
            if drafted is not None:
                self._tell_parents(batch, trees[0])
                return drafted
        step = self._step(
            batch,
            num_rejected,
            last_hidden_states,
            aux_hidden_states,
            dummy_run,
            skip_attn_for_dummy_run,
        )
        carried = self.read(step)
        tokens = None
        for index in trees:
            state = self.draft_logits.states[index]
            if not dummy_run:
                self.request_trees.record_drafted(reqs, index)
            drafting = self._with_rows(step, index, temperature, seeds)
            of_drafting = _rows_of(carried, slice(drafting.num_reqs))
            for part, of_part in self._parts(drafting, of_drafting, state):
                self.draft(part, of_part, state, temperature, seeds)
            tokens = state.tokens[drafting.draft_rows]
            if not dummy_run:
                self._tell_parents(batch, index)
        if tokens is None:
            return self._nothing(batch.num_reqs)
        missing = self.draft_logits.num_nodes - tokens.shape[1], batch.num_reqs - len(tokens)
        if any(missing):
            tokens = torch.nn.functional.pad(tokens, (0, missing[0], 0, missing[1]))
        return tokens

    def _tell_parents(self, batch: InputBatch, index: int) -> None:
        """Queue a copy of the trees that requests have decided, if the scheduler needs them."""
        state = self.draft_logits.states[index]
        if state.grown is not None and batch.has_structured_output_reqs:
            rows = self.request_trees.draft_rows_for(batch.idx_mapping_np)
            parents = state.tables.parents[async_tensor_h2d(rows, device=self.device)]
            self.drafted_parents = parents.to("cpu", non_blocking=True)

    def replay_step(
        self,
        batch: InputBatch,
        # the place in the schedule of the tree to draft
        tree: int,
        # [num_reqs]
        num_rejected: torch.Tensor,
        # [num_tokens_after_padding, hidden_size]
        hidden_states: torch.Tensor,
        # each [num_tokens_after_padding, hidden_size]
        aux_hidden_states: list[torch.Tensor] | None,
        # [max_num_reqs]
        temperature: torch.Tensor,
        # [max_num_reqs]
        seeds: torch.Tensor,
    ) -> torch.Tensor | None:
        """Draft by replaying a graph of the whole step, if one was captured for such a batch.

        Returns:
            What `propose` returns; None if the step has to run in parts.
        """
        return None

    def _nothing(self, num_reqs: int) -> torch.Tensor:
        """What `propose` returns if it drafts nothing."""
        shape = num_reqs, self.draft_logits.num_nodes
        return torch.zeros(shape, dtype=torch.int64, device=self.device)

    def _with_rows(
        self,
        step: DraftStep,
        index: int,
        # [max_num_reqs]
        temperature: torch.Tensor,
        # [max_num_reqs]
        seeds: torch.Tensor,
    ) -> DraftStep:
        """The step, with a row for each request's draft among those of a tree. Requests for which
        there is no row are left out: only start-up has more of them than the schedule says."""
        rows = self.draft_logits.states[index].rows
        if rows is None:
            return step
        most = len(rows.seeds) - 1
        if step.num_reqs > most:
            step = step.part(0, most)
        given = np.arange(step.num_reqs)
        if not step.dummy_run:
            given = self.request_trees.draft_rows_for(step.batch.idx_mapping_np)
        draft_rows = async_tensor_h2d(given, device=self.device)
        rows.temperature[draft_rows] = temperature[step.batch.idx_mapping]
        rows.seeds[draft_rows] = seeds[step.batch.idx_mapping]
        return replace(step, draft_rows=draft_rows)

    def _parts(
        self, step: DraftStep, carried: Carried, state: DraftState
    ) -> Iterator[tuple[DraftStep, Carried]]:
        """The step in parts of so many requests that no level has more than `max_rows` rows, and
        what `read` returned for each part's requests."""
        num_reqs = step.num_reqs
        widest = max(len(level.nodes_np) for level in state.levels)
        # One that looks its drafts up has neither passes nor logits.
        most = num_reqs if self.point_masses else max(1, self.max_rows // widest)
        if num_reqs <= most:
            yield step, carried
            return
        if most > ALIGNED:  # kernels are compiled for tensors that begin at aligned addresses
            most -= most % ALIGNED
        for first in range(0, num_reqs, most):
            last = min(first + most, num_reqs)
            yield step.part(first, last), _rows_of(carried, slice(first, last))

    def draft(
        self,
        step: DraftStep,
        carried: Carried,
        state: DraftState,
        # [max_num_reqs]
        temperature: torch.Tensor,
        # [max_num_reqs]
        seeds: torch.Tensor,
    ) -> None:
        """Draft a tree for each request of a step, level by level.

        A proposer of point masses may override this in place of `level_logits`. It writes the
        nodes' tokens to the rows `step.draft_rows` of `state.tokens`, and 0 to those of
        `state.drafts.sampled`.
        """
        idx_mapping, reqs = step.batch.idx_mapping, step.batch.idx_mapping_np
        truncated = np.empty(0, dtype=np.int64)
        if not step.dummy_run and not step.captured:
            (truncated,) = truncates(self.sampling_states, reqs).nonzero()
        if state.rows is not None:
            temperature, seeds = state.rows
        requests = Requests(step.draft_rows, step.root_positions, temperature, seeds)
        for depth in range(len(state.levels)):
            level = state.level(depth, step.draft_rows)
            logits, carried = self.level_logits(step, depth, level, state, carried)
            truncate(logits, self.sampling_states, idx_mapping, reqs, truncated)
            self.rule.sample_children(logits, level, requests, state)

    def _step(
        self,
        batch: InputBatch,
        # [num_reqs]
        num_rejected: torch.Tensor,
        # [num_tokens_after_padding, hidden_size]
        hidden_states: torch.Tensor,
        # each [num_tokens_after_padding, hidden_size]
        aux_hidden_states: list[torch.Tensor] | None,
        dummy_run: bool,
        skip_attn: bool,
    ) -> DraftStep:
        query_start = batch.query_start_loc[: batch.num_reqs]
        query_end = batch.query_start_loc[1 : batch.num_reqs + 1]
        accepted = query_end - query_start - num_rejected  # [num_reqs], the old root included
        first_positions = batch.positions[query_start]
        return DraftStep(
            batch=batch,
            first_positions=first_positions,
            root_positions=first_positions + accepted,
            num_rejected=num_rejected,
            hidden_states=hidden_states,
            aux_hidden_states=aux_hidden_states,
            accepted_paths=None if dummy_run else self.request_trees.accepted_paths(batch),
            dummy_run=dummy_run,
            skip_attn=dummy_run and skip_attn,
            draft_rows=batch.idx_mapping,
        )
