# SPDX-License-Identifier: Apache-2.0
"""Verifies every request's tree and puts the accepted path where a plain decode would have it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

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
)

from vllm_spechub.engine.combination import Combination
from vllm_spechub.engine.compaction import PathCompactor
from vllm_spechub.engine.layout import TreeLayout
from vllm_spechub.engine.processors import (
    HistoryProcessors,
    UnrolledRows,
    most_processed_rows,
    unroll,
)
from vllm_spechub.engine.request_trees import RequestTrees
from vllm_spechub.engine.truncation import truncates
from vllm_spechub.rules.base import VerificationRule
from vllm_spechub.rules.draft_state import DraftBuffers
from vllm_spechub.triton_kernels.arguments import Requests, TargetRows, VerifiedPaths


@dataclass
class TreeSamplerOutput(SamplerOutput):
    """vLLM's sampler output, with the accepted nodes."""

    # [num_reqs, depth + 1] int32, the accepted node of each depth, 0 first; -1 past the end, and
    # everywhere if the request had lost its draft
    accepted_paths: torch.Tensor = field(kw_only=True)
    # [num_reqs, depth] int32, the place of each accepted node among its siblings, if some tree is
    # decided by each step
    accepted_slots: torch.Tensor | None = field(kw_only=True)
    # the same on the host, once the copy that `start_copy_to_host` queues is through
    accepted_paths_on_host: torch.Tensor = field(init=False)
    accepted_slots_on_host: torch.Tensor | None = field(init=False, default=None)

    def start_copy_to_host(self) -> None:
        """Queue a copy of the accepted paths to the host, without waiting for it."""
        self.accepted_paths_on_host = self.accepted_paths.to("cpu", non_blocking=True)
        if self.accepted_slots is not None:
            self.accepted_slots_on_host = self.accepted_slots.to("cpu", non_blocking=True)


@dataclass(frozen=True)
class ProcessedRows:
    """The target's rows of some requests of a batch, after their sampling parameters."""

    # [num_rows, vocab_size]
    logits: torch.Tensor
    # [max_num_reqs] float32, what the rows must still be divided by, 0 for greedy requests
    temperature: torch.Tensor
    # [num_reqs] int32, each request's first row
    row_start: torch.Tensor
    # [num_reqs] the requests' places in the batch, on the host and on the device; None for all
    places_np: np.ndarray | None = None
    places: torch.Tensor | None = None
    # [num_rows] the place of each row among the batch's; None if they are the batch's
    source: torch.Tensor | None = None


class Drafted(NamedTuple):
    """What a batch verifies, beside the target's rows."""

    draft: DraftBuffers
    # [num_reqs]
    num_nodes: torch.Tensor
    # [num_reqs] int64
    root_positions: torch.Tensor
    # [num_rows]
    node_tokens: torch.Tensor


class Verified(NamedTuple):
    """What verification gave for some requests of a batch."""

    # [num_reqs] their places in the batch; None for all
    places: np.ndarray | None
    paths: VerifiedPaths
    logprobs: LogprobsTensors | None


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
        combination: Combination | None = None,
    ) -> None:
        super().__init__(sampler, config, device)
        self.rule = rule
        self.history = history
        self.request_trees = request_trees
        self.compactor = compactor
        self.layout = layout
        self.combination = combination
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
        if self.combination is not None:
            self.combination.read(batch)
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

        drafted = Drafted(draft, num_nodes, root_positions, batch.input_ids[batch.logits_indices])
        verified = []
        for rows in self.process(logits, batch):
            verified.append(self._verify(rows, logits, batch, drafted))
            del rows  # the next part is made in its memory
        paths, logprobs = self._in_order(verified, batch)
        self.compactor(root_positions, paths.path)
        self.request_trees.record_accepted(paths.path)
        assert batch.num_draft_tokens_per_req is not None  # else vLLM's own sampler runs
        lost = self.request_trees.draft_rows_for(batch.idx_mapping_np) < 0
        lost &= (batch.num_draft_tokens_per_req > 0) & ~batch.is_prefilling_np
        if lost.any():
            paths.path[async_tensor_h2d(lost.nonzero()[0], device=logits.device), 0] = -1

        num_sampled, num_rejected = get_num_sampled_and_rejected(
            paths.num_emitted, batch.seq_lens, batch.cu_num_logits, batch.idx_mapping, prefill_len
        )
        return TreeSamplerOutput(
            sampled_token_ids=paths.tokens,
            logprobs_tensors=logprobs,
            num_nans=num_nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
            accepted_paths=paths.path,
            accepted_slots=self.layout.nodes.slots(batch.idx_mapping_np, paths.path)
            if any(self.layout.nodes.decides)
            else None,
        )

    def verify_nothing(self, draft: DraftBuffers, dtype: torch.dtype) -> None:
        """Verify a request without drafts against rows of a dtype, as each tree is verified, and
        move none of its KV."""
        states = self.sampler.sampling_states
        for state in draft.states:
            num_rows = 1 + state.tree.num_nodes
            one = torch.zeros(1, dtype=torch.int64, device=state.tokens.device)
            rows = torch.zeros(num_rows, dtype=torch.int64, device=one.device)
            logits = torch.zeros(num_rows, states.vocab_size, dtype=dtype, device=one.device)
            temperature, seeds = state.rows or (states.temperature.gpu, states.seeds.gpu)
            target = TargetRows(logits, temperature, one.int(), one.int(), rows.int(), rows)
            requests = Requests(one, one, temperature, seeds)
            self.compactor(one, self.rule.verify(target, requests, state).path)

    def _verify(
        self,
        rows: ProcessedRows,
        # [num_batch_rows, vocab_size], all rows as the target gave them
        logits: torch.Tensor,
        batch: InputBatch,
        drafted: Drafted,
    ) -> Verified:
        """Verify the trees of the requests that some rows belong to."""

        def of_rows(
            # [num_batch_rows]
            table: torch.Tensor,
        ) -> torch.Tensor:
            return table if rows.source is None else table[rows.source]

        def of_requests(
            # [num_reqs of the batch]
            table: torch.Tensor,
        ) -> torch.Tensor:
            return table if rows.places is None else table[rows.places]

        states = self.sampler.sampling_states
        reqs, row_start = batch.idx_mapping_np, rows.row_start
        num_drafts, prefills = batch.num_draft_tokens_per_req, batch.is_prefilling_np
        assert num_drafts is not None  # else vLLM's own sampler runs
        if rows.places_np is not None:
            reqs, num_drafts = reqs[rows.places_np], num_drafts[rows.places_np]
            prefills = prefills[rows.places_np]
        idx_mapping, root_positions = map(of_requests, (batch.idx_mapping, drafted.root_positions))
        drawn = None
        if self.rule.reads_draws:
            drawn = self._draw(
                rows.logits,
                of_rows(batch.expanded_idx_mapping),
                rows.temperature,
                self.layout.positions[of_rows(batch.logits_indices)],
            )
        target = TargetRows(
            rows.logits,
            rows.temperature,
            row_start,
            of_requests(drafted.num_nodes),
            of_rows(drafted.node_tokens),
            drawn,
        )
        requests = Requests(idx_mapping, root_positions, states.temperature.gpu, states.seeds.gpu)
        paths = self._verify_each_tree(target, requests, reqs, num_drafts, drafted.draft)
        if rows.places is not None:  # other parts may have deeper trees
            paths = paths.padded(1 + max(tree.depth for tree in self.request_trees.trees))
        # vLLM's sampler handles batches without any tree, and a request's seed must give the same
        # token whether or not others in its batch have a tree.
        lost = self.request_trees.draft_rows_for(reqs) < 0
        (no_tree,) = ((num_drafts == 0) | prefills | lost).nonzero()
        if len(no_tree):
            without = async_tensor_h2d(no_tree, device=logits.device)
            paths.tokens[without, 0] = self._draw(
                rows.logits[row_start[without]],
                idx_mapping[without],
                rows.temperature,
                root_positions[without],
            )
        if self.reports_processed:
            logits = rows.logits
        else:
            row_start = of_requests(batch.cu_num_logits[:-1])
        return Verified(
            rows.places_np, paths, self._logprobs(logits, row_start, batch, idx_mapping, paths)
        )

    def _in_order(
        self, verified: list[Verified], batch: InputBatch
    ) -> tuple[VerifiedPaths, LogprobsTensors | None]:
        """What was verified in parts, in the order of the batch's requests."""
        (_, paths, logprobs), *others = verified
        num_reqs, width = batch.num_reqs, paths.path.shape[1]
        if others:
            places = np.concatenate([part.places for part in verified if part.places is not None])
            order = async_tensor_h2d(np.argsort(places), device=batch.idx_mapping.device)
            columns = zip(*(part.paths for part in verified), strict=True)
            paths = VerifiedPaths(*(torch.cat(column)[order] for column in columns))
            scores = [part.logprobs for part in verified if part.logprobs is not None]
            if scores:
                rows = order.unsqueeze(1) * width + torch.arange(width, device=order.device)
                logprobs = LogprobsTensors.cat(scores).filter(rows.flatten())
        if logprobs is not None:
            bounds = list(range(0, num_reqs * width + 1, width))
            logprobs = logprobs._replace(cu_num_generated_tokens=bounds)
        return paths, logprobs

    def _verify_each_tree(
        self,
        target: TargetRows,
        requests: Requests,
        # [num_reqs] the requests' states
        reqs: np.ndarray,
        # [num_reqs]
        num_drafts: np.ndarray,
        draft: DraftBuffers,
    ) -> VerifiedPaths:
        """Verify each request with its own tree. Nearly every batch has a single tree."""
        states, num_nodes = draft.states, target.num_nodes.to(torch.int32)
        tree_index = self.request_trees.index_for(reqs)
        draft_rows = self.request_trees.draft_rows_for(reqs)
        drafted = (num_drafts > 0) & (draft_rows >= 0)
        present: list[int] = np.unique(tree_index[drafted]).tolist() or [0]
        # unless some have another tree, or have lost their draft
        is_everyones = len(present) == 1 and not num_drafts[~drafted].any()

        def verify(index: int) -> tuple[torch.Tensor | None, VerifiedPaths]:
            state, mine_np = states[index], drafted & (tree_index == index)
            mine = None if is_everyones else async_tensor_h2d(mine_np, device=num_nodes.device)
            own = target._replace(num_nodes=num_nodes if mine is None else num_nodes * mine)
            own_requests = requests
            if state.rows is not None:
                nobodys = len(state.rows.seeds) - 1
                rows_np = np.where(mine_np, draft_rows, nobodys)
                rows = async_tensor_h2d(rows_np, device=num_nodes.device)
                temperature = torch.zeros_like(state.rows.temperature)
                temperature[rows] = target.temperature[requests.req_idx]
                own = own._replace(temperature=temperature)
                own_requests = Requests(rows, requests.root_positions, *state.rows)
            return mine, self.rule.verify(own, own_requests, state)

        if len(present) == 1:
            return verify(present[0])[1]
        width = 1 + max(states[index].tree.depth for index in present)
        (_, merged), *others = map(verify, present)
        merged = merged.padded(width)
        for mine, paths in others:
            assert mine is not None  # with several trees
            merged = paths.padded(width).where(mine, merged)
        return merged

    def process(
        self,
        # [num_rows, vocab_size]
        logits: torch.Tensor,
        batch: InputBatch,
    ) -> Iterator[ProcessedRows]:
        """Apply the sampling parameters to every node's row, each with its own path as history.

        Requests that ask for nothing beyond temperature keep their rows: verification divides those
        that it reads. The rows of the others come in parts of bounded size, in fp32. Whoever has
        verified a part drops it before the next one is made.
        """
        temperature = self.sampler.sampling_states.temperature.gpu
        row_start = batch.cu_num_logits[:-1]
        needs = self._needs_processing(batch.idx_mapping_np)
        if not needs.any():
            yield ProcessedRows(logits, temperature, row_start)
            return

        def on_device(array: np.ndarray) -> torch.Tensor:
            return async_tensor_h2d(array, device=logits.device)

        (plain,) = (~needs).nonzero()
        if len(plain):
            places = on_device(plain)
            yield ProcessedRows(logits, temperature, row_start[places], plain, places)
        (chosen,) = needs.nonzero()
        first_row = batch.cu_num_logits_np[:-1][chosen]
        num_nodes = batch.cu_num_logits_np[1:][chosen] - first_row - 1
        reqs = batch.idx_mapping_np[chosen]
        rows = unroll(
            self.request_trees.trees_for(reqs),
            num_nodes,
            first_row,
            self.history.needs_history[reqs],
        )
        # A temperature above 0 has been divided by.
        remaining = (temperature > 0).to(temperature.dtype)
        for start, end in _iter_request_chunks(rows.bounds, most_processed_rows(logits.shape[1])):
            part = rows.for_requests(start, end)
            own_start = np.cumsum([0, *(num_nodes[start : end - 1] + 1)])
            yield ProcessedRows(
                self._process(logits, batch, chosen[start:end], part),
                remaining,
                on_device(own_start.astype(np.int32)),
                chosen[start:end],
                on_device(chosen[start:end]),
                on_device(part.ends()[0]),
            )

    def _process(
        self,
        # [num_rows, vocab_size]
        logits: torch.Tensor,
        batch: InputBatch,
        # [num_chosen] requests' places in the batch
        chosen: np.ndarray,
        rows: UnrolledRows,
    ) -> torch.Tensor:
        """The chosen requests' rows, processed. [num_chosen_rows, vocab_size] float32"""

        def on_device(array: np.ndarray) -> torch.Tensor:
            return async_tensor_h2d(array, device=logits.device)

        source, depth = on_device(rows.source), on_device(rows.depth)
        most_steps = int(rows.steps_up.max())
        if most_steps:
            nodes = self.layout.nodes
            of_row = np.repeat(chosen, np.diff(rows.bounds))
            first = on_device(batch.cu_num_logits_np[of_row].astype(np.int64))
            entries = on_device(nodes.root_entries(batch.idx_mapping_np[of_row]))
            steps_up = on_device(rows.steps_up)
            source = first + nodes.ancestors(entries, source - first, steps_up, most_steps)
        tree_rows = batch.logits_indices[source]
        # [num_rows] slots count nodes in breadth-first order, processors need depths
        slot = batch.expanded_local_pos[source]
        reqs, idx_mapping = batch.idx_mapping_np[chosen], batch.expanded_idx_mapping[source]
        arguments = (
            idx_mapping,
            batch.idx_mapping[on_device(chosen)],
            reqs,
            batch.positions[tree_rows] - slot + depth,
            batch.input_ids[tree_rows],
            on_device(rows.local_pos).to(batch.expanded_local_pos.dtype),
            batch.seq_lens_cpu_upper_bound.numpy()[chosen],
        )

        def edit(
            # [num_rows, vocab_size]
            raw: torch.Tensor,
        ) -> torch.Tensor:
            return self.sampler.apply_sampling_params(raw, *arguments)

        combination, raw = self.combination, logits[source]
        if combination is None or combination.rows is None or not combination.on[reqs].any():
            edited = edit(raw)
        else:
            others = [rows[source] for rows in combination.rows]
            edited = combination.process(edit, raw, others, idx_mapping, reqs)
        tree_rows, ends = rows.ends()
        if len(tree_rows) < len(rows.source):
            edited = edited[on_device(ends)]
        return edited.to(torch.float32)

    def _needs_processing(
        self,
        # [num_reqs]
        reqs: np.ndarray,
    ) -> np.ndarray:
        """Which requests ask for more than a temperature, or for rows that are combined. [num_reqs]
        bool"""
        states = self.sampler.sampling_states
        needs = self.history.used[reqs] | truncates(states, reqs)
        if self.combination is not None:
            needs |= self.combination.wanted(reqs)
        if self.reports_processed:
            needs |= states.num_logprobs[reqs] != NO_LOGPROBS
            needs |= self.sampler.logprob_token_ids_state.num_token_ids.np[reqs] > 0
        return needs

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
        # [num_reqs] each request's first row
        row_start: torch.Tensor,
        batch: InputBatch,
        # [num_reqs]
        idx_mapping: torch.Tensor,
        paths: VerifiedPaths,
    ) -> LogprobsTensors | None:
        """The log-probabilities of the emitted tokens, a row for each depth, from the rows along
        each accepted path; None if no request of the batch asks for any."""
        sampler = self.sampler
        dims = sampler.get_logprobs_dims(batch.idx_mapping_np)
        if dims is None:
            return None
        num_logprobs, max_per_req_token_ids = dims
        rows = (row_start.unsqueeze(1) + paths.path.clamp(min=0)).flatten()
        return compute_topk_scores(
            logits[rows],
            num_logprobs,
            paths.tokens.clamp(min=0).flatten(),  # what is past a path's end is not read
            logprob_token_ids_state=sampler.logprob_token_ids_state,
            expanded_idx_mapping=idx_mapping.repeat_interleave(paths.path.shape[1]),
            max_per_req_token_ids=max_per_req_token_ids,
            logits_mode=sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )
