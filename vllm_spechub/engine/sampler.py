# SPDX-License-Identifier: Apache-2.0
"""Verifies every request's tree and puts the accepted path where a plain decode would have it."""

import torch
from vllm.config import SpeculativeConfig
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_spechub.drafting import DraftState
from vllm_spechub.engine.compaction import PathCompactor
from vllm_spechub.engine.history import HistoryProcessors, unroll
from vllm_spechub.rules import VerificationRule


class TreeRejectionSampler(RejectionSampler):
    """vLLM's rejection sampler for trees: one verification rule, then compaction."""

    def __init__(
        self,
        sampler: Sampler,
        config: SpeculativeConfig,
        device: torch.device,
        rule: VerificationRule,
        history: HistoryProcessors,
        compactor: PathCompactor,
    ) -> None:
        super().__init__(sampler, config, device)
        self.tree = config.tree
        self.rule = rule
        self.history = history
        self.compactor = compactor
        self.reports_processed = sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES

    def __call__(
        self,
        # [num_rows, vocab_size]
        logits: torch.Tensor,
        input_batch: InputBatch,
        draft: DraftState,
        # [num_rows], rows whose draft the grammar has not seen
        invalid_drafts: torch.Tensor | None = None,
    ) -> SamplerOutput:
        sampler, batch = self.sampler, input_batch
        num_nans = get_num_nans(logits) if sampler.compute_nans else None
        row_start = batch.cu_num_logits[:-1]
        root_tokens = batch.logits_indices[row_start]
        root_positions = batch.positions[root_tokens]
        prefill_len = sampler.req_states.prefill_len.gpu

        num_nodes = batch.cu_num_logits[1:] - row_start - 1
        if invalid_drafts is not None:
            # With asynchronous scheduling a grammar may miss a tree: only its root's row is masked.
            num_nodes = num_nodes * ~invalid_drafts[row_start + num_nodes.clamp(max=1)]
        # A tree below a prompt token is a placeholder that pads a new request's first step.
        num_nodes = num_nodes * (root_positions >= prefill_len[batch.idx_mapping])

        processed, target_temperature = self.process(logits, batch)
        temperature = sampler.sampling_states.temperature.gpu
        tokens, num_emitted, path = self.rule.verify(
            processed,
            row_start,
            num_nodes.to(torch.int32),
            batch.input_ids[batch.logits_indices],
            batch.idx_mapping,
            root_positions,
            target_temperature,
            temperature,
            sampler.sampling_states.seeds.gpu,
            draft,
        )
        self._sample_without_tree(processed, processed is logits, batch, root_positions, tokens)
        self.compactor(root_positions, path)
        self._compact_input_ids(batch.input_ids, root_tokens, tokens, path)

        num_sampled, num_rejected = get_num_sampled_and_rejected(
            num_emitted, batch.seq_lens, batch.cu_num_logits, batch.idx_mapping, prefill_len
        )
        return SamplerOutput(
            sampled_token_ids=tokens,
            logprobs_tensors=self._logprobs(logits, processed, batch, tokens, num_sampled, path),
            num_nans=num_nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def process(
        self,
        # [num_rows, vocab_size]
        logits: torch.Tensor,
        batch: InputBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply the sampling parameters to every node's row, each with its own path as history.

        Returns:
            The processed rows [num_rows, vocab_size], and what they are still to be divided by,
            [max_num_reqs] float32, 0 for greedy requests. A batch that asks for nothing beyond
            temperature keeps its logits as they are: verification divides the rows it reads.
        """
        sampler, states = self.sampler, self.sampler.sampling_states
        reqs = batch.idx_mapping_np
        temperature = states.temperature.gpu
        uses_history = self.history.used[reqs]
        if not (
            uses_history.any()
            or (self.reports_processed and states.max_num_logprobs(reqs) != NO_LOGPROBS)
            or (states.top_k.np[reqs] != states.vocab_size).any()
            or (states.top_p.np[reqs] != 1.0).any()
            or (states.min_p.np[reqs] != 0.0).any()
        ):
            return logits, temperature

        first_row = batch.cu_num_logits_np[:-1]
        num_nodes = batch.cu_num_logits_np[1:] - first_row - 1
        rows = unroll(self.tree, num_nodes, first_row, uses_history)
        source = torch.from_numpy(rows.source).to(logits.device, non_blocking=True)
        result = torch.from_numpy(rows.result).to(logits.device, non_blocking=True)
        depth = torch.from_numpy(rows.depth).to(logits.device, non_blocking=True)
        local_pos = torch.from_numpy(rows.local_pos).to(logits.device, non_blocking=True)
        tree_rows = batch.logits_indices[source]
        # [num_rows] slots count nodes in breadth-first order, processors need depths
        slot = batch.expanded_local_pos[source]
        processed = sampler.apply_sampling_params(
            logits[source],
            batch.expanded_idx_mapping[source],
            batch.idx_mapping,
            reqs,
            batch.positions[tree_rows] - slot + depth,
            batch.input_ids[tree_rows],
            local_pos.to(batch.expanded_local_pos.dtype),
            batch.seq_lens_cpu_upper_bound.numpy(),
        )
        return processed[result], (temperature > 0).to(temperature.dtype)

    def _sample_without_tree(
        self,
        # [num_rows, vocab_size]
        processed: torch.Tensor,
        apply_temperature: bool,
        batch: InputBatch,
        # [num_reqs]
        root_positions: torch.Tensor,
        # [num_reqs, depth + 1]
        tokens: torch.Tensor,
    ) -> None:
        """Draw for requests that brought no tree, or a placeholder, as vLLM's sampler does.

        It samples batches without any tree, and a request's seed must give the same token
        whether or not others in its batch have one.
        """
        no_tree = (batch.num_draft_tokens_per_req == 0) | batch.is_prefilling_np
        without = torch.from_numpy(no_tree.nonzero()[0])
        if len(without) == 0:
            return
        without = without.to(tokens.device, non_blocking=True)
        states = self.sampler.sampling_states
        tokens[without, 0] = gumbel_sample(
            processed[batch.cu_num_logits[without]],
            batch.idx_mapping[without],
            states.temperature.gpu,
            states.seeds.gpu,
            root_positions[without],
            apply_temperature=apply_temperature,
            is_drafting=False,
            use_fp64=self.sampler.use_fp64_gumbel,
        )

    @staticmethod
    def _compact_input_ids(
        # [num_tokens]
        input_ids: torch.Tensor,
        # [num_reqs], index of the root's token
        root_tokens: torch.Tensor,
        # [num_reqs, depth + 1]
        tokens: torch.Tensor,
        # [num_reqs, depth + 1]
        path: torch.Tensor,
    ) -> None:
        """Put the accepted tokens behind their root: the draft model reads them from there."""
        accepted = path[:, 1:] >= 0
        offsets = torch.arange(1, path.shape[1], device=path.device)
        # What was not accepted rewrites the root's own token: no mask, so no synchronisation.
        destination = root_tokens.unsqueeze(1) + offsets * accepted
        kept = input_ids[root_tokens].unsqueeze(1)
        input_ids[destination] = torch.where(accepted, tokens[:, :-1].to(input_ids.dtype), kept)

    def _logprobs(
        self,
        # [num_rows, vocab_size]
        logits: torch.Tensor,
        # [num_rows, vocab_size]
        processed: torch.Tensor,
        batch: InputBatch,
        # [num_reqs, depth + 1]
        tokens: torch.Tensor,
        # [num_reqs]
        num_sampled: torch.Tensor,
        # [num_reqs, depth + 1]
        path: torch.Tensor,
    ):
        """Log-probabilities of the emitted tokens, from the rows along each accepted path."""
        max_num_logprobs = self.sampler.sampling_states.max_num_logprobs(batch.idx_mapping_np)
        if max_num_logprobs == NO_LOGPROBS:
            return None
        if self.reports_processed:
            logits = processed
        width = path.shape[1]
        rows = (batch.cu_num_logits[:-1].unsqueeze(1) + path.clamp(min=0)).flatten()
        starts = torch.arange(0, len(rows) + 1, width, dtype=torch.int32)
        return self._get_logprobs_tensors(
            tokens,
            num_sampled,
            logits[rows],
            starts.to(logits.device, non_blocking=True),
            starts.numpy(),
            max_num_logprobs,
        )
