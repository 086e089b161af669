# SPDX-License-Identifier: Apache-2.0
"""`TreeProposer`, the base class of what drafts a tree for every request, level by level.

A proposer is a speculator of vLLM's V2 runner. The base class looks up which tree a step drafts,
runs the loop over the tree's levels, applies sampling parameters to the draft's rows of logits, and
lets the verification rule draw every child. A subclass computes the rows: with a model of its own
(`vllm_spechub.proposers.model_proposer`), from the target's hidden states, or without any model.
"""

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from vllm.config import CUDAGraphMode, ModelConfig, VllmConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.states import SamplingStates
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator
from vllm.v1.worker.gpu.states import RequestState

from vllm_spechub.config import SpecHubConfig, spechub_config
from vllm_spechub.engine.model_state import TreeModelState
from vllm_spechub.engine.request_trees import RequestTrees
from vllm_spechub.engine.truncation import truncate, truncates
from vllm_spechub.rules.base import VerificationRule
from vllm_spechub.rules.draft_state import DraftBuffers, DraftLevel, DraftState
from vllm_spechub.triton_kernels.arguments import Requests

Carried = TypeVar("Carried")
"""What a proposer hands from one level to the next, such as hidden states."""


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

    @property
    def num_reqs(self) -> int:
        return self.batch.num_reqs


class TreeProposer(BaseSpeculator, Generic[Carried]):
    """Drafts one tree per request and step.

    A subclass implements `read` and `level_logits`.

    Attributes:
        vllm_method: the speculative method in vLLM's configuration. It decides what vLLM prepares:
            slots for drafts in the KV cache, auxiliary hidden states, the draft's configuration.
        options: keys of `--speculative-config` beyond the common ones that this proposer reads;
            their values are in `config.proposer_options`.
        needs_model: whether the option `model` names something to load.
        draft_logits: what was drafted. vLLM passes this attribute to the rejection sampler.
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

    supports_mm_inputs: bool = False
    draft_logits: DraftBuffers
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
        self.draft_logits = DraftBuffers(
            self.schedule.trees, self.max_num_reqs, self.vocab_size, self.logits_dtype(), device
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
            if model is not None:
                raise ValueError(
                    f"speculative_config['model'] is {model!r}, but proposer "
                    f"{options.get('proposer')!r} loads no model; leave it out"
                )
            return
        if not model:
            raise ValueError(
                "speculative_config['model'] is missing: name the draft model, a folder or a "
                "Hugging Face id (--spec-model DRAFT)"
            )
        if str(model).startswith(("/", "./", "../", "~")) and not Path(model).is_dir():
            raise ValueError(f"speculative_config['model']: there is no folder {model!r}")

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
            What `level_logits` needs for the roots.
        """

    @abstractmethod
    def level_logits(
        self, step: DraftStep, depth: int, level: DraftLevel, state: DraftState, carried: Carried
    ) -> tuple[torch.Tensor, Carried]:
        """Compute the draft's logits at the internal nodes of one depth.

        Args:
            step: the step that drafts.
            depth: 0 for the roots.
            level: the nodes; `level.rows(step.num_reqs)` lays them out for the batch.
            state: holds the tokens drafted so far; `node_tokens` picks those of a level.
            carried: what `read` or the level above returned.

        Returns:
            Logits before temperature, [num_reqs * num_expanded, vocab_size of the target], a
            request's nodes side by side, -inf where a token must not be drafted; the caller
            overwrites them. And what the next level needs.
        """

    def node_tokens(
        self, step: DraftStep, depth: int, level: DraftLevel, state: DraftState
    ) -> torch.Tensor:
        """The tokens of a level's nodes, [num_reqs * num_expanded] int64.

        At depth 0 these are the roots: each request's last token, or the first one of its prompt
        that the target has not read yet.
        """
        idx_mapping = step.batch.idx_mapping
        if depth == 0:
            positions = step.root_positions.clamp(max=self.max_model_len - 1)
            return self.req_states.all_token_ids.gpu[idx_mapping, positions].long()
        rows = level.rows(step.num_reqs)
        return state.tokens[idx_mapping[rows.req], rows.column]

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
        batch, buffers = input_batch, self.draft_logits
        idx_mapping, reqs = batch.idx_mapping, batch.idx_mapping_np
        index = 0
        if num_speculative_tokens is not None:
            index = self.schedule.index(num_speculative_tokens)
        if index is None and self.may_pause(batch):
            self.request_trees.pause_reading(reqs)
            return buffers.tokens[idx_mapping]
        step = self._step(
            batch,
            num_rejected,
            last_hidden_states,
            aux_hidden_states,
            dummy_run,
            skip_attn_for_dummy_run,
        )
        carried = self.read(step)
        if index is None:
            return buffers.tokens[idx_mapping]
        truncated = np.empty(0, dtype=np.int64)
        if not dummy_run:
            self.request_trees.record_drafted(reqs, index)
            (truncated,) = truncates(self.sampling_states, reqs).nonzero()
        state = buffers.states[index]
        requests = Requests(idx_mapping, step.root_positions, temperature, seeds)
        for depth, level in enumerate(state.levels):
            logits, carried = self.level_logits(step, depth, level, state, carried)
            truncate(logits, self.sampling_states, idx_mapping, reqs, truncated)
            self.rule.sample_children(logits, level, requests, state)
        return buffers.tokens[idx_mapping]

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
        )
