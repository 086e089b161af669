# SPDX-License-Identifier: Apache-2.0
"""Combined targets in the engine: another member's rows beside the target's, before sampling.

After the target's forward pass, the other member reads the same batch: the member pass. Its rows
stand beside the target's, one by one, at nodes, leaves, prompts' last tokens and requests without a
tree alike. What is verified, or sampled where there is no tree, is combined of both.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_spechub.engine.processors import HistoryProcessors
from vllm_spechub.targets.base import TargetDistribution

Edit = Callable[[torch.Tensor], torch.Tensor]
"""Applies every sampling parameter to some rows, and leaves the rows that it is given as they are.
"""


@dataclass(frozen=True)
class MemberBatch:
    """The target's batch as another member reads it."""

    batch: InputBatch
    # [num_tokens] int64, RoPE positions
    positions: torch.Tensor
    # each KV cache group's slots, [num_kv_cache_groups, num_tokens] int64
    slot_mappings: torch.Tensor
    # attention groups -> the metadata of their layers for this batch, with trees as the target's
    attention: Callable[[list[list[Any]]], dict[str, Any]]


class Member(Protocol):
    """A model that reads the target's batch."""

    def member_rows(self, batch: MemberBatch) -> torch.Tensor:
        """Read the batch. Returns logits [num_rows, vocab_size of the target], a row for each of
        the target's, -inf for tokens that the member lacks."""
        ...


class Combination:
    """What requests ask to be combined, and the member that it is combined of.

    Args:
        target: the engine's target distribution.
        max_num_reqs: request-state slots.

    Attributes:
        on: [max_num_reqs] bool, whether a request wants a combination.
        rows: the member's rows of the batch that is being sampled, [num_rows, vocab_size]; None in
            a trial without requests.
        history: which requests' rows are edited by a processor; set by `custom_sampler`.
    """

    history: HistoryProcessors

    def __init__(self, target: TargetDistribution, max_num_reqs: int) -> None:
        self.target = target
        self.on = np.zeros(max_num_reqs, dtype=bool)
        self.rows: torch.Tensor | None = None
        self._member: Member
        self._staged: MemberBatch | None = None
        # [max_num_reqs] each
        self._on = UvaBackedTensor(max_num_reqs, dtype=torch.bool)
        self._parameters = {
            name: UvaBackedTensor(max_num_reqs, dtype=torch.float32) for name in target.parameters
        }

    def bind(self, member: Member) -> None:
        """Take the other member, once it is loaded."""
        self._member = member

    def add_request(self, req_index: int, sampling_params: SamplingParams | None) -> None:
        """Begin a request. The engine has checked its `extra_args` when it came in."""
        target = self.target.of_request(sampling_params.extra_args if sampling_params else None)
        self.on[req_index] = self._on.np[req_index] = target is not None
        if target is not None:
            for name, value in target.parameters.items():
                self._parameters[name].np[req_index] = value

    def apply_staged_writes(self) -> None:
        """Copy what requests ask for to the device."""
        for tensor in (self._on, *self._parameters.values()):
            tensor.copy_to_uva()

    def stage(self, batch: MemberBatch) -> None:
        """Remember the batch that the target is about to read."""
        self._staged = batch

    def read(self, batch: InputBatch) -> None:
        """Run the member pass, whatever the requests want: the member's cache must be true where
        a later request finds it. vLLM's trials of the sampler have no batch that was read."""
        staged, self._staged, self.rows = self._staged, None, None
        if staged is not None and staged.batch is batch:
            self.rows = self._member.member_rows(staged)

    def wanted(
        self,
        # [num_reqs]
        reqs: np.ndarray,
    ) -> np.ndarray:
        """Which requests' rows are to be combined. [num_reqs] bool"""
        return self.on[reqs] if self.rows is not None else np.zeros(len(reqs), dtype=bool)

    def process(
        self,
        edit: Edit,
        # [num_rows, vocab_size] of the target, a copy or not
        p: torch.Tensor,
        # [num_rows, vocab_size] of the member
        q: torch.Tensor,
        # [num_rows] each row's request state
        idx_mapping: torch.Tensor,
        # [num_reqs] the requests that the rows belong to
        reqs: np.ndarray,
    ) -> torch.Tensor:
        """Combine rows and apply the sampling parameters. [num_rows, vocab_size] float32

        Requests that want no combination get the target's rows, with the parameters applied.
        """
        parameters: Mapping[str, torch.Tensor] = {
            name: tensor.gpu[idx_mapping].unsqueeze(1) for name, tensor in self._parameters.items()
        }
        # the grammar's mask has edited the target's rows only
        q = q.float().masked_fill(p == -torch.inf, -torch.inf)
        on = self._on.gpu[idx_mapping].unsqueeze(1)
        if self.target.of_processed:
            mine = edit(p).float()
            return torch.where(on, self.target.combine(mine, edit(q), **parameters), mine)
        p = p.float()
        edited = edit(torch.where(on, self.target.combine(p, q, **parameters), p))
        if self.history.used[reqs].any():
            # Tokens that are excluded later may be all that were left.
            nothing = edited.amax(dim=1, keepdim=True) == -torch.inf
            edited = torch.where(nothing, edit(p), edited)
        return edited


class CombiningSampler(Sampler):
    """vLLM's sampler, for batches without any tree whose rows are combined."""

    combination: Combination

    @classmethod
    def of(cls, sampler: Sampler, combination: Combination) -> "CombiningSampler":
        """vLLM's own, with all that it holds."""
        combining = cls.__new__(cls)
        vars(combining).update(vars(sampler))
        combining.combination = combination
        return combining

    def __call__(self, logits, input_batch):
        self.combination.read(input_batch)
        return super().__call__(logits, input_batch)

    def sample(
        self,
        logits,
        expanded_idx_mapping,
        idx_mapping,
        idx_mapping_np,
        *where,
        return_logprobs=False,
    ):
        """Sample each row's token. Returns tokens [num_rows], and rows [num_rows, vocab_size] with
        every sampling parameter applied."""
        requests, rows = (expanded_idx_mapping, idx_mapping, idx_mapping_np), self.combination.rows
        if rows is None or not self.combination.on[idx_mapping_np].any():
            return super().sample(logits, *requests, *where, return_logprobs=return_logprobs)
        pos, *_ = where
        processed = self.combination.process(
            lambda raw: self.apply_sampling_params(raw, *requests, *where),
            logits,
            rows,
            expanded_idx_mapping,
            idx_mapping_np,
        )
        tokens = gumbel_sample(
            processed,
            expanded_idx_mapping,
            self.sampling_states.temperature.gpu,
            self.sampling_states.seeds.gpu,
            pos,
            apply_temperature=False,
            is_drafting=False,
            use_fp64=self.use_fp64_gumbel,
        )
        return tokens, processed
