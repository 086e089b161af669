# SPDX-License-Identifier: Apache-2.0
"""Requests, drafts and target rows that verification and child sampling are measured on."""

from dataclasses import replace

import numpy as np
import torch

from vllm_spechub.rules.draft_state import DraftState
from vllm_spechub.trees.schedule import TreeSchedule
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels import arguments

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
POSITION = 1000  # of every root


def prepare_platform(device: torch.device) -> None:
    """Prepare the process as an engine's worker does before it imports a kernel."""
    if device.type == "cpu":
        import vllm.v1.worker.cpu.shm  # noqa: F401

        from vllm_spechub.integration.platforms.cpu import register_host_kernels

        register_host_kernels()


def draft_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random logits whose probabilities fall with the rank to the power 1.5, much as in texts."""
    rows = torch.empty(shape, dtype=dtype, device=device)
    for row in rows.view(-1, shape[-1]).split(64):
        row.copy_(torch.empty(row.shape, device=device).exponential_().mul_(1.5))
    return rows


def disturb(rows: torch.Tensor) -> torch.Tensor:
    """Add noise to a draft's rows, in place, to make a target's rows of them."""
    for row in rows.view(-1, rows.shape[-1]).split(64):
        row.add_(torch.randn(row.shape, device=row.device).mul_(0.5))
    return rows


class Requests:
    """A decode step of `batch` requests, each with a tree or a chain of `tree.num_nodes` drafts.

    It consists of vLLM's own sampler and batch, so that sampling parameters work as in an engine.
    """

    def __init__(
        self,
        batch: int,
        vocab: int,
        tree: TokenTree,
        temperature: float,
        top_p: float,
        device: torch.device,
    ) -> None:
        from vllm.config import SpeculativeConfig, VllmConfig
        from vllm.sampling_params import SamplingParams
        from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
        from vllm.v1.worker.gpu.sample.sampler import Sampler
        from vllm.v1.worker.gpu.states import RequestState

        from vllm_spechub.engine.processors import HistoryProcessors
        from vllm_spechub.engine.request_trees import RequestTrees
        from vllm_spechub.engine.sampler import TreeRejectionSampler

        width = 1 + tree.num_nodes
        num_rows = batch * width
        self.tree, self.vocab, self.device = tree, vocab, device
        states = RequestState(batch, POSITION + width, num_rows, tree.num_nodes, vocab, device)
        self.sampler = Sampler(VllmConfig(), batch, vocab, device, states)
        # one that loads nothing, for what a rejection sampler reads of it
        self.config = SpeculativeConfig(method="ngram", num_speculative_tokens=tree.num_nodes)
        schedule = TreeSchedule.constant(tree)
        history = HistoryProcessors(self.sampler.logits_processors, batch)
        self.tree_sampler = TreeRejectionSampler(
            self.sampler,
            self.config,
            device,
            rule=None,
            history=history,
            request_trees=RequestTrees(schedule, batch, device),
            compactor=None,
            layout=None,
        )
        for req in range(batch):
            params = SamplingParams(temperature=temperature, top_p=top_p, seed=req)
            self.sampler.add_request(req, params)
            history.add_request(req, params)
        self.sampler.apply_staged_writes()
        history.apply_staged_writes()

        first_row = np.arange(batch + 1, dtype=np.int32) * width
        self.row_start = torch.from_numpy(first_row[:-1]).to(device)
        self.root_positions = torch.full((batch,), POSITION, device=device)
        local_pos = torch.arange(width, dtype=torch.int32, device=device).repeat(batch)
        dummy = InputBatch.make_dummy(batch, num_rows, InputBuffers(batch, num_rows, device))
        self.batch = replace(
            dummy,
            expanded_idx_mapping=dummy.idx_mapping.repeat_interleave(width),
            expanded_local_pos=local_pos,
            positions=POSITION + local_pos.long(),
            num_draft_tokens=batch * tree.num_nodes,
            num_draft_tokens_per_req=np.full(batch, tree.num_nodes),
            logits_indices=torch.arange(num_rows, device=device),
            cu_num_logits=torch.from_numpy(first_row).to(device),
            cu_num_logits_np=first_row,
        )

    @property
    def temperature(self) -> torch.Tensor:
        """[batch] float32"""
        return self.sampler.sampling_states.temperature.gpu

    @property
    def seeds(self) -> torch.Tensor:
        """[batch] int64"""
        return self.sampler.sampling_states.seeds.gpu

    @property
    def drafting(self) -> arguments.Requests:
        """What the kernels must know about the requests."""
        return arguments.Requests(
            self.batch.idx_mapping, self.root_positions, self.temperature, self.seeds
        )

    def draft(self, dtype: torch.dtype, rule: str) -> DraftState:
        """Every request's tree, drafted level by level as the engine does."""
        from vllm_spechub.engine.truncation import truncate, truncates
        from vllm_spechub.integration.select import platform
        from vllm_spechub.rules.kernel_rule import KernelRule

        verification = KernelRule(rule, platform().tree_kernels())
        batch, params = self.batch, self.sampler.sampling_states
        reqs = batch.idx_mapping_np
        (chosen,) = truncates(params, reqs).nonzero()
        state = DraftState.empty(self.tree, len(reqs), self.vocab, dtype, self.device)
        for level in state.levels:
            rows = level.rows(batch.num_reqs)
            logits = draft_rows((len(rows.nodes), self.vocab), dtype, self.device)
            truncate(logits, params, batch.idx_mapping, reqs, chosen)
            verification.sample_children(logits, level, self.drafting, state)
        return state

    def target_rows(self, state: DraftState, dtype: torch.dtype) -> torch.Tensor:
        """The target's rows, similar to the draft's of the same node. [batch * (1 + num_nodes),
        vocab]"""
        shape = (self.batch.num_reqs, 1 + self.tree.num_nodes, self.vocab)
        rows = draft_rows(shape, dtype, self.device)
        for internal, node in enumerate(self.tree.internal_nodes):
            # What the draft's top-p ruled out is improbable.
            rows[:, node] = state.drafts.logits[:, internal].clamp(min=0)
        return disturb(rows).flatten(0, 1)
