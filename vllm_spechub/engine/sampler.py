# SPDX-License-Identifier: Apache-2.0
"""Verifies every request's tree and puts the accepted path where a plain decode would have it."""

from dataclasses import dataclass, field

import numpy as np
import torch
from vllm.config import SpeculativeConfig
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import (
    RejectionSampler,
    _iter_request_chunks,
    get_max_chunk_logits,
)

from vllm_spechub.engine.compaction import PathCompactor
from vllm_spechub.engine.layout import TreeLayout
from vllm_spechub.engine.processors import HistoryProcessors, UnrolledRows, unroll
from vllm_spechub.engine.request_trees import RequestTrees
from vllm_spechub.engine.truncation import truncates
from vllm_spechub.rules.base import VerificationRule
from vllm_spechub.rules.draft_state import DraftBuffers, DraftState
from vllm_spechub.triton_kernels.arguments import Requests, TargetRows, VerifiedPaths


@dataclass
class TreeSamplerOutput(SamplerOutput):
    """vLLM's sampler output, with the accepted nodes."""

    # [num_reqs, depth + 1] int32, the accepted node of each depth, 0 first; -1 past the end
    accepted_paths: torch.Tensor = field(kw_only=True)
    # the same on the host, once the copy that `start_copy_to_host` queues is through
    accepted_paths_on_host: torch.Tensor = field(init=False)

    def start_copy_to_host(self) -> None:
        """Queue a copy of the accepted paths to the host, without waiting for it."""
        self.accepted_paths_on_host = self.accepted_paths.to("cpu", non_blocking=True)


class TreeRejectionSampler(RejectionSampler):
    """vLLM's rejection sampler for trees: one verification rule, then compaction."""

    def __init__(
        self,
        sampler: Sampler,
        config: SpeculativeConfig,
        device: torch.device,
        rule: VerificationRule,
        history: HistoryProcessors,
        request_trees: RequestTrees,
        compactor: PathCompactor,
        layout: TreeLayout,
    ) -> None:
        super().__init__(sampler, config, device)
        self.rule = rule
        self.history = history
        self.request_trees = request_trees
        self.compactor = compactor
        self.layout = layout
        self.reports_processed = sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES

    def __call__(
        self,
        # [num_rows, vocab_size]
        logits: torch.Tensor,
        input_batch: InputBatch,
        draft: DraftBuffers,
        # [num_rows], rows whose draft the grammar has not seen
        invalid_drafts: torch.Tensor | None = None,
    ) -> SamplerOutput:
        sampler, batch = self.sampler, input_batch
        num_nans = get_num_nans(logits) if sampler.compute_nans else None
        row_start = batch.cu_num_logits[:-1]
        root_positions = batch.positions[batch.logits_indices[row_start]]
        prefill_len = sampler.req_states.prefill_len.gpu

        num_nodes = batch.cu_num_logits[1:] - row_start - 1
        if invalid_drafts is not None:
            # With asynchronous scheduling a grammar may miss a tree: only its root's row is masked.
            num_nodes = num_nodes * ~invalid_drafts[row_start + num_nodes.clamp(max=1)]
        # A tree below a prompt token is a placeholder that pads a new request's first step.
        num_nodes = num_nodes * (root_positions >= prefill_len[batch.idx_mapping])

        processed, target_temperature = self.process(logits, batch)
        temperature = sampler.sampling_states.temperature.gpu
        node_tokens = batch.input_ids[batch.logits_indices]
        drawn = None
        if self.rule.reads_draws:
            drawn = self._draw(
                processed,
                batch.expanded_idx_mapping,
                target_temperature,
                self.layout.positions[batch.logits_indices],
            )
        target = TargetRows(processed, target_temperature, row_start, num_nodes, node_tokens, drawn)
        requests = Requests(
            batch.idx_mapping, root_positions, temperature, sampler.sampling_states.seeds.gpu
        )
        tokens, num_emitted, path = self._verify_each_tree(target, requests, batch, draft)
        self._sample_without_tree(processed, target_temperature, batch, root_positions, tokens)
        self.compactor(root_positions, path)
        self.request_trees.record_accepted(path)

        num_sampled, num_rejected = get_num_sampled_and_rejected(
            num_emitted, batch.seq_lens, batch.cu_num_logits, batch.idx_mapping, prefill_len
        )
        return TreeSamplerOutput(
            sampled_token_ids=tokens,
            logprobs_tensors=self._logprobs(logits, processed, batch, tokens, path),
            num_nans=num_nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
            accepted_paths=path,
        )

    def _verify_each_tree(
        self,
        target: TargetRows,
        requests: Requests,
        batch: InputBatch,
        draft: DraftBuffers,
    ) -> VerifiedPaths:
        """Verify each request with its own tree. Nearly every batch has a single tree."""

        def verify(
            # [num_reqs]
            num_nodes: torch.Tensor,
            state: DraftState,
        ) -> VerifiedPaths:
            checked = target._replace(num_nodes=num_nodes.to(torch.int32))
            return self.rule.verify(checked, requests, state)

        num_nodes = target.num_nodes
        if len(self.request_trees.trees) == 1:
            return verify(num_nodes, draft.states[0])
        assert batch.num_draft_tokens_per_req is not None  # else vLLM's own sampler runs
        tree_index = self.request_trees.index_for(batch.idx_mapping_np)
        first, *others = np.unique(tree_index[batch.num_draft_tokens_per_req > 0])
        if not others:
            return verify(num_nodes, draft.states[first])
        width = 1 + max(draft.states[index].tree.depth for index in (first, *others))

        def verify_tree(index: int) -> tuple[torch.Tensor, VerifiedPaths]:
            mine = async_tensor_h2d(tree_index == index, device=num_nodes.device)
            return mine, verify(num_nodes * mine, draft.states[index]).padded(width)

        _, merged = verify_tree(first)
        for index in others:
            mine, paths = verify_tree(index)
            merged = paths.where(mine, merged)
        return merged

    def process(
        self,
        # [num_rows, vocab_size]
        logits: torch.Tensor,
        batch: InputBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply the sampling parameters to every node's row, each with its own path as history.

        Returns:
            The processed rows [num_rows, vocab_size], and the temperatures by which rows are still
            to be divided, [max_num_reqs] float32, 0 for greedy requests. Requests that ask for
            nothing beyond temperature keep their rows: verification divides those that it reads.
        """
        sampler, reqs = self.sampler, batch.idx_mapping_np
        temperature = sampler.sampling_states.temperature.gpu
        (chosen,) = self._needs_processing(reqs).nonzero()
        if len(chosen) == 0:
            return logits, temperature

        first_row = batch.cu_num_logits_np[:-1]
        num_nodes = batch.cu_num_logits_np[1:] - first_row - 1
        needs_history = self.history.needs_history[reqs[chosen]]
        trees = self.request_trees.trees_for(reqs[chosen])
        rows = unroll(trees, num_nodes[chosen], first_row[chosen], needs_history)
        processed = logits.to(torch.float32, copy=True)
        remaining = temperature.clone()
        # vLLM's cap on rows: its processors allocate several times what they are given.
        for start, end in _iter_request_chunks(rows.bounds, get_max_chunk_logits(logits.shape[1])):
            self._process(
                logits, batch, chosen[start:end], rows.for_requests(start, end), processed
            )
        idx_mapping = batch.idx_mapping[async_tensor_h2d(chosen, device=logits.device)]
        remaining[idx_mapping] = (temperature[idx_mapping] > 0).to(remaining.dtype)
        return processed, remaining

    def _process(
        self,
        # [num_rows, vocab_size]
        logits: torch.Tensor,
        batch: InputBatch,
        # [num_chosen] requests' places in the batch
        chosen: np.ndarray,
        rows: UnrolledRows,
        # [num_rows, vocab_size], the chosen requests' rows are written
        processed: torch.Tensor,
    ) -> None:
        def on_device(array: np.ndarray) -> torch.Tensor:
            return async_tensor_h2d(array, device=logits.device)

        reqs = batch.idx_mapping_np[chosen]
        source, depth = on_device(rows.source), on_device(rows.depth)
        tree_rows = batch.logits_indices[source]
        # [num_rows] slots count nodes in breadth-first order, processors need depths
        slot = batch.expanded_local_pos[source]
        edited = self.sampler.apply_sampling_params(
            logits[source],
            batch.expanded_idx_mapping[source],
            batch.idx_mapping[on_device(chosen)],
            reqs,
            batch.positions[tree_rows] - slot + depth,
            batch.input_ids[tree_rows],
            on_device(rows.local_pos).to(batch.expanded_local_pos.dtype),
            batch.seq_lens_cpu_upper_bound.numpy()[chosen],
        )
        # A node that several paths share has the same row in each.
        nodes, unrolled = np.unique(rows.source, return_index=True)
        if len(nodes) < len(rows.source):
            edited = edited[on_device(unrolled)]
        processed[on_device(nodes)] = edited.to(torch.float32)

    def _needs_processing(
        self,
        # [num_reqs]
        reqs: np.ndarray,
    ) -> np.ndarray:
        """Which requests ask for more than a temperature. [num_reqs] bool"""
        states = self.sampler.sampling_states
        needs = self.history.used[reqs] | truncates(states, reqs)
        if self.reports_processed:
            needs |= states.num_logprobs[reqs] != NO_LOGPROBS
            needs |= self.sampler.logprob_token_ids_state.num_token_ids.np[reqs] > 0
        return needs

    def _sample_without_tree(
        self,
        # [num_rows, vocab_size]
        processed: torch.Tensor,
        # [max_num_reqs]
        target_temperature: torch.Tensor,
        batch: InputBatch,
        # [num_reqs]
        root_positions: torch.Tensor,
        # [num_reqs, depth + 1]
        tokens: torch.Tensor,
    ) -> None:
        """Sample a token for requests without a tree, or with a placeholder, as vLLM would.

        vLLM's sampler handles batches without any tree, and a request's seed must give the same
        token whether or not others in its batch have a tree.
        """
        no_tree = (batch.num_draft_tokens_per_req == 0) | batch.is_prefilling_np
        if not no_tree.any():
            return
        without = async_tensor_h2d(no_tree.nonzero()[0], device=tokens.device)
        tokens[without, 0] = self._draw(
            processed[batch.cu_num_logits[without]],
            batch.idx_mapping[without],
            target_temperature,
            root_positions[without],
        )

    def _draw(
        self,
        # [num_rows, vocab_size]
        processed: torch.Tensor,
        # [num_rows] int32, each row's request state
        idx_mapping: torch.Tensor,
        # [max_num_reqs] float32
        temperature: torch.Tensor,
        # [num_rows] int64, where each row's token stands in its sequence
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """What plain decoding draws from each row, with its noise. [num_rows] int64"""
        return gumbel_sample(
            processed,
            idx_mapping,
            temperature,
            self.sampler.sampling_states.seeds.gpu,
            positions,
            apply_temperature=True,
            is_drafting=False,
            use_fp64=self.sampler.use_fp64_gumbel,
        )

    def _logprobs(
        self,
        # [num_rows, vocab_size]
        logits: torch.Tensor,
        # [num_rows, vocab_size]
        processed: torch.Tensor,
        batch: InputBatch,
        # [num_reqs, depth + 1]
        tokens: torch.Tensor,
        # [num_reqs, depth + 1]
        path: torch.Tensor,
    ) -> LogprobsTensors | None:
        """The log-probabilities of the emitted tokens, from the rows along each accepted path; None
        if no request asks for any."""
        sampler = self.sampler
        dims = sampler.get_logprobs_dims(batch.idx_mapping_np)
        if dims is None:
            return None
        num_logprobs, max_per_req_token_ids = dims
        if self.reports_processed:
            logits = processed
        num_reqs, width = path.shape
        rows = (batch.cu_num_logits[:-1].unsqueeze(1) + path.clamp(min=0)).flatten()
        return compute_topk_scores(
            logits[rows],
            num_logprobs,
            tokens.clamp(min=0).flatten(),  # what is past a path's end is not read
            list(range(0, num_reqs * width + 1, width)),
            logprob_token_ids_state=sampler.logprob_token_ids_state,
            expanded_idx_mapping=batch.idx_mapping.repeat_interleave(width),
            max_per_req_token_ids=max_per_req_token_ids,
            logits_mode=sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )
