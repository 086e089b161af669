# SPDX-License-Identifier: Apache-2.0
"""Combined targets in the engine: other members' rows beside the target's, before sampling.

After the target's forward pass, the other members read the same batch: the member passes. Their
rows stand beside the target's, one by one, at nodes, leaves, prompts' last tokens and requests
without a tree alike. What is verified, or sampled where there is no tree, is combined of all.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_spechub.engine.member_pass import MemberBatch, MemberPass
from vllm_spechub.engine.processors import HistoryProcessors
from vllm_spechub.targets.base import TargetDistribution

Edit = Callable[[torch.Tensor], torch.Tensor]
"""Applies every sampling parameter to some rows, and leaves the rows that it is given as they are.
"""


class Combination:
    """What requests ask to be combined, and the members that it is combined of.

    Args:
        target: the engine's target distribution.
        members: those that the target distribution names.
        max_num_reqs: request-state slots.
        max_num_tokens: of a batch.
        device: where the target runs.

    Attributes:
        members: the others beside the target; a draft that is read puts itself first.
        on: [max_num_reqs] bool, whether a request wants a combination.
        rows: the members' rows of the batch that is being sampled, [num_rows, vocab_size] each;
            None in a trial without requests.
        history: which requests' rows are edited by a processor; set by `custom_sampler`.
    """

    history: HistoryProcessors

    def __init__(
        self,
        target: TargetDistribution,
        members: list[MemberPass],
        max_num_reqs: int,
        max_num_tokens: int,
        device: torch.device,
    ) -> None:
        self.target = target
        self.members = members
        self.max_num_tokens = max_num_tokens
        self.device = device
        self.on = np.zeros(max_num_reqs, dtype=bool)
        self.rows: list[torch.Tensor] | None = None
        self._staged: MemberBatch | None = None
        # [max_num_reqs]
        self._on = UvaBackedTensor(max_num_reqs, dtype=torch.bool)
        # by name, [max_num_reqs, how many numbers it is]
        self._parameters = {
            name: UvaBackedTensor((max_num_reqs, np.size(value)), dtype=torch.float32)
            for name, value in target.parameters.items()
        }

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
        """Run the member passes, whatever the requests want: the members' caches must be true where
        a later request finds them. vLLM's trial of the sampler has no batch that was read."""
        staged, self._staged, self.rows = self._staged, None, None
        if staged is not None and staged.batch is batch:
            self.rows = [member.rows(staged) for member in self.members]
            return
        for member in self.members:
            member.try_out(self.max_num_tokens, self.device)

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
        # [num_rows, vocab_size] of each member
        others: Sequence[torch.Tensor],
        # [num_rows] each row's request state
        idx_mapping: torch.Tensor,
        # [num_reqs] the requests that the rows belong to
        reqs: np.ndarray,
    ) -> torch.Tensor:
        """Combine rows and apply the sampling parameters. [num_rows, vocab_size] float32

        Requests that want no combination get the target's rows, with the parameters applied.
        """
        values = {name: tensor.gpu[idx_mapping] for name, tensor in self._parameters.items()}
        on, banned = self._on.gpu[idx_mapping].unsqueeze(1), p == -torch.inf

        def of_member(
            # [num_rows, vocab_size]
            q: torch.Tensor,
        ) -> torch.Tensor:
            # the grammar's mask has edited the target's rows only
            return q.float().masked_fill(banned, -torch.inf)

        if self.target.of_processed:
            mine, theirs = edit(p).float(), [edit(of_member(q)) for q in others]
            return torch.where(on, self.target.combine(mine, theirs, **values), mine)
        p = p.float()
        combined = self.target.combine(p, [of_member(q) for q in others], **values)
        edited = edit(torch.where(on, combined, p))
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
