# SPDX-License-Identifier: Apache-2.0
"""A separate draft model that expands the tree level by level.

Every step first feeds the draft the tokens that were accepted, which also gives the root's
children, then one pass per further depth. Nodes live in consecutive slots after the root in
breadth-first order and see their ancestors only. The next step writes the accepted tokens again,
in their final slots, so the draft's KV cache needs no compaction.

While a schedule asks for no trees the draft sits out the steps in which every request decodes, and
reads what it missed when trees are asked for again.
"""

from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode, ModelConfig, VllmConfig, replace
from vllm.tokenizers import get_tokenizer
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

from vllm_spechub.attention.visibility import TreeVisibility
from vllm_spechub.engine.truncation import truncate, truncates
from vllm_spechub.proposers.cuda_graphs import DraftGraphs, DraftPass
from vllm_spechub.rules.base import VerificationRule
from vllm_spechub.rules.draft_state import DraftBuffers, DraftLevel, DraftState


class DraftModelProposer(StandaloneARSpeculator):
    """Drafts with a smaller model of the same vocabulary; see `TreeProposer`."""

    vllm_method = "draft_model"
    options = frozenset()
    needs_model = True

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, rule: VerificationRule
    ) -> None:
        super().__init__(vllm_config, device)
        self.rule = rule
        self.schedule = vllm_config.speculative_config.schedule
        # the target's, which may be padded to another size than the draft's own
        self.draft_vocab_size, self.vocab_size = (
            self.vocab_size,
            vllm_config.model_config.get_vocab_size(),
        )
        dtype, _ = self.draft_logits_spec(vllm_config)
        self.draft_logits = DraftBuffers(
            self.schedule.trees, self.max_num_reqs, self.vocab_size, dtype, device
        )
        self.graphs: DraftGraphs | None = None
        # [max_num_reqs] the first position that the draft has not read, or the last root's
        self.unread = torch.zeros(self.max_num_reqs, dtype=torch.int64, device=device)

    @classmethod
    def check_options(cls, options: dict[str, Any], target_model_config: ModelConfig) -> None:
        draft = options.get("model")
        if not draft:
            raise ValueError(
                "speculative_config['model'] is missing: name the draft model, a folder or a "
                "Hugging Face id (--spec-model DRAFT)"
            )
        if str(draft).startswith(("/", "./", "../", "~")) and not Path(draft).is_dir():
            raise ValueError(f"speculative_config['model']: there is no folder {draft!r}")

    @classmethod
    def check_config(cls, config) -> None:
        draft, target = config.draft_model_config, config.target_model_config
        if draft.max_model_len < target.max_model_len:
            raise ValueError(
                f"speculative_config['model']: the draft reads {draft.max_model_len} positions, "
                f"the target {target.max_model_len}; set max_model_len to at most "
                f"{draft.max_model_len}"
            )
        sizes = draft.get_vocab_size(), target.get_vocab_size()
        if not (Path(draft.model) / "tokenizer.json").is_file() and sizes[0] == sizes[1]:
            return
        shared = get_tokenizer(
            target.tokenizer,
            tokenizer_mode=target.tokenizer_mode,
            revision=target.tokenizer_revision,
            trust_remote_code=target.trust_remote_code,
        ).get_vocab()
        own = get_tokenizer(draft.model, tokenizer_mode=target.tokenizer_mode).get_vocab()
        if own != shared:
            raise ValueError(
                "speculative_config['model']: the draft's tokenizer differs from the "
                "target's; draft and target need one vocabulary"
            )
        if max(shared.values()) >= min(sizes) and sizes[0] != sizes[1]:
            raise ValueError(
                f"speculative_config['model']: the draft's vocab_size={sizes[0]} and the target's "
                f"vocab_size={sizes[1]} may differ by padding only, but the tokenizer's ids go up "
                f"to {max(shared.values())}"
            )

    def load_draft_model(self, target_model, target_attn_layer_names):
        """Load the draft with its own sliding window, where vLLM would give it the target's."""
        draft, shared = self.draft_model_config, self.vllm_config
        layer_types = getattr(draft.hf_text_config, "layer_types", None)
        # as vLLM decides for a target: mixed layers bring their windows themselves
        uniform = layer_types is None or set(layer_types) == {"sliding_attention"}
        window = draft.get_sliding_window() if uniform else None
        self.vllm_config = copy(shared)
        self.vllm_config.cache_config = replace(shared.cache_config, sliding_window=window)
        try:
            return super().load_draft_model(target_model, target_attn_layer_names)
        finally:
            self.vllm_config = shared

    def set_attn(
        self, model_state, kv_cache_config, block_tables: BlockTables, *args, **kwargs
    ) -> None:
        super().set_attn(model_state, kv_cache_config, block_tables, *args, **kwargs)
        self.has_windows = any(
            getattr(group.kv_cache_spec, "sliding_window", None) is not None
            for group in kv_cache_config.kv_cache_groups
            if self.draft_attn_layer_names.intersection(group.layer_names)
        )
        widest = max(self._rows_per_request())
        # [num_kv_cache_groups, most rows of a pass]
        self.slots = torch.empty(
            block_tables.num_kv_cache_groups,
            max(self.max_num_tokens + self.max_num_reqs, self.max_num_reqs * widest),
            dtype=torch.int64,
            device=self.device,
        )

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        self.graphs = None
        if cudagraph_mode.decode_mode() == CUDAGraphMode.FULL:
            self.graphs = DraftGraphs(self, self._rows_per_request())

    def _rows_per_request(self) -> set[int]:
        """The numbers of rows that a request has in the passes of a step, if it has no prompt."""
        states = self.draft_logits.states
        # of a whole tree what may have been accepted below its root, and the new root
        rows = {state.tree.depth + 1 for state in states}
        return rows | {len(level.nodes_np) for state in states for level in state.levels[1:]}

    def capture(self) -> None:
        if self.graphs is not None:
            self.graphs.capture()

    def compute_draft_logits(
        self,
        # [num_rows, hidden_size]
        hidden_states: torch.Tensor,
        spec_step_idx: int,
    ) -> torch.Tensor:
        """[num_rows, vocab_size] of the target: what the draft pads beyond it is cut off, and
        what it lacks is never drafted."""
        logits = super().compute_draft_logits(hidden_states, spec_step_idx)
        missing = self.vocab_size - self.draft_vocab_size
        if missing:
            logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        return logits

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
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
        dp_sync_state=None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs=None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Draft one tree per request.

        Args:
            num_speculative_tokens: nodes of the tree to draft, one of the schedule's; 0 for none;
                None for the largest.

        Returns:
            Tokens [num_reqs, num_nodes of the largest tree], the drafted tree's first, in node
            order.
        """
        batch, buffers = input_batch, self.draft_logits
        idx_mapping, reqs = batch.idx_mapping, batch.idx_mapping_np
        index = 0
        if num_speculative_tokens is not None:
            index = self.schedule.index(num_speculative_tokens)
        if index is None and self._may_read_later(batch):
            self.model_state.drafted.behind[reqs] += 1
            return buffers.tokens[idx_mapping]
        step = _DraftStep(self, batch, dummy_run, skip_attn_for_dummy_run)
        hidden = step.prefill(num_rejected)
        if index is None:
            return buffers.tokens[idx_mapping]
        truncated = np.empty(0, dtype=np.int64)
        if not dummy_run:
            self.model_state.drafted.index[reqs] = index
            (truncated,) = truncates(self.model_state.sampling_states, reqs).nonzero()
        state = buffers.states[index]
        for depth, level in enumerate(state.levels):
            if depth > 0:
                hidden = step.forward_level(depth, level, state)
            logits = self.compute_draft_logits(hidden, depth)
            if len(truncated):
                states = self.model_state.sampling_states
                truncate(logits, states, idx_mapping, reqs, truncated)
            self.rule.sample_children(
                logits, level, idx_mapping, step.root_positions, temperature, seeds, state
            )
        return buffers.tokens[idx_mapping]

    def _may_read_later(self, batch: InputBatch) -> bool:
        """Whether the draft may sit this step out: every request decodes its next token.

        Prompts are read at once, since the prefix cache hands their blocks to others; and so is
        everything by a draft with sliding windows, whose blocks may be another's by then.
        """
        decodes = batch.num_draft_tokens == 0 and not batch.is_prefilling_np.any()
        return decodes and not self.has_windows


class _DraftStep:
    """The draft model's forward passes of one step."""

    def __init__(
        self,
        proposer: DraftModelProposer,
        batch: InputBatch,
        dummy_run: bool,
        skip_attn: bool,
    ) -> None:
        self.proposer = proposer
        self.batch = batch
        self.dummy_run = dummy_run
        self.skip_attn = dummy_run and skip_attn
        self.num_reqs = batch.num_reqs
        self.device = proposer.device
        self.max_model_len = proposer.max_model_len
        # [num_reqs] sequence position of the root of the tree being drafted, set by `prefill`
        self.root_positions: torch.Tensor

    def prefill(
        self,
        # [num_reqs]
        num_rejected: torch.Tensor,
    ) -> torch.Tensor:
        """Feed the tokens since the last one that the draft has read, then the new root.

        Of a verified tree only as many rows are fed as can have been accepted below its root, a
        bound known without waiting for the device. Returns the roots' hidden states,
        [num_reqs, hidden_size].
        """
        batch, proposer = self.batch, self.proposer
        lags, skipped, counts = self._rows_to_feed(num_rejected)
        starts_np = np.zeros(self.num_reqs + 1, dtype=np.int32)
        np.cumsum(counts, out=starts_np[1:])
        req_np = np.repeat(np.arange(self.num_reqs), counts)
        local_np = np.arange(starts_np[-1]) - starts_np[req_np]

        starts = async_tensor_h2d(starts_np, device=self.device)
        req = async_tensor_h2d(req_np, device=self.device)
        local = async_tensor_h2d(local_np, device=self.device)
        query_start = batch.query_start_loc[: self.num_reqs]
        query_end = batch.query_start_loc[1 : self.num_reqs + 1]
        accepted = query_end - query_start - num_rejected  # [num_reqs], the old root included
        first_position = batch.positions[query_start]  # [num_reqs]
        self.root_positions = root = first_position + accepted

        begin = first_position + async_tensor_h2d(skipped, device=self.device)
        if lags.any():
            lags = async_tensor_h2d(lags, device=self.device)
            begin = torch.where(lags, proposer.unread[batch.idx_mapping], begin)
        end = begin + torch.diff(starts)
        positions = begin[req] + local
        unused = positions > root[req]
        if self.dummy_run:
            tokens = torch.zeros_like(positions, dtype=torch.int32)
        else:
            if proposer.schedule.pauses:
                proposer.unread[batch.idx_mapping] = torch.minimum(end, root)
            read = positions.clamp(max=self.max_model_len - 1)
            all_token_ids = proposer.model_state.req_states.all_token_ids.gpu
            tokens = all_token_ids[batch.idx_mapping[req], read]
        hidden = self._forward(tokens, positions, positions, starts, starts_np, end, unused, None)
        # A request that still lags has no root among its rows, and drafts from what it has read.
        return hidden[starts[:-1] + torch.minimum(root, end - 1) - begin]

    def _rows_to_feed(
        self,
        # [num_reqs]
        num_rejected: torch.Tensor,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which requests lag behind, [num_reqs] bool; how many of their scheduled tokens the draft
        has read, [num_reqs]; and how many rows each gets, [num_reqs]."""
        batch, proposer = self.batch, self.proposer
        lengths = batch.num_scheduled_tokens[: self.num_reqs].astype(np.int64)
        skipped = np.zeros_like(lengths)
        if self.dummy_run:
            return skipped > 0, skipped, lengths + 1
        drafted, reqs = proposer.model_state.drafted, batch.idx_mapping_np
        behind = drafted.behind[reqs]
        if batch.num_draft_tokens_per_req is not None:
            drafts = batch.num_draft_tokens_per_req[: self.num_reqs]
            if self.device.type == "cpu":
                lengths -= num_rejected.numpy()  # there is no device to wait for
            else:
                lengths -= np.maximum(drafts - drafted.depths[drafted.index[reqs]], 0)
            # a tree's root was read to draft it; below a prompt's token trees are placeholders
            skipped += (drafts > 0) & ~batch.is_prefilling_np[: self.num_reqs] & (behind == 0)
        counts = lengths - skipped + 1
        if proposer.graphs is not None and not (behind.any() or batch.is_prefilling_np.any()):
            # a few rows to spare make the batch uniform, as graphs are
            counts[:] = drafted.depths[drafted.index[reqs]].max() + 1
        # what this step's tokens leave of the buffers, given to those who lag one after the other
        room = proposer.max_num_tokens + proposer.max_num_reqs - counts.sum()
        caught_up = np.clip(room - (np.cumsum(behind) - behind), 0, behind)
        drafted.behind[reqs] = behind - caught_up
        return behind > 0, skipped, counts + caught_up

    def forward_level(self, depth: int, level: DraftLevel, state: DraftState) -> torch.Tensor:
        """Feed one depth's nodes. Returns hidden states [num_reqs * num_expanded, hidden_size]."""
        num_expanded, rows = len(level.nodes_np), level.rows(self.num_reqs)
        root = self.root_positions[rows.req]
        tree = TreeVisibility(
            visible_until=root.to(torch.int32),
            tree_mask=rows.ancestor_masks,
            num_tree_tokens=np.full(self.num_reqs, num_expanded),
        )
        return self._forward(
            state.tokens[self.batch.idx_mapping[rows.req], rows.column].to(torch.int32),
            root + depth,
            root + rows.nodes,
            level.starts[: self.num_reqs + 1],
            level.starts_np[: self.num_reqs + 1],
            self.root_positions + int(level.nodes_np[-1]) + 1,
            None,
            tree,
        )

    def _forward(
        self,
        # [num_tokens] int32
        tokens: torch.Tensor,
        # [num_tokens] int64, RoPE positions
        positions: torch.Tensor,
        # [num_tokens] int64, sequence positions of the KV slots
        slots: torch.Tensor,
        # [num_reqs + 1] int32
        starts: torch.Tensor,
        # [num_reqs + 1] int32
        starts_np: np.ndarray,
        # [num_reqs]
        seq_lens: torch.Tensor,
        # [num_tokens], rows that must write nothing
        unused: torch.Tensor | None,
        tree: TreeVisibility | None,
    ) -> torch.Tensor:
        proposer, batch = self.proposer, self.batch
        last = self.max_model_len - 1
        # The bound covers this step's tokens; a new tree adds its root and its nodes.
        nodes = proposer.schedule.trees[0].num_nodes
        bound = batch.seq_lens_cpu_upper_bound[: self.num_reqs] + nodes + 1
        outside = unused
        if int(bound.max()) > last:
            # no slots there, and the last one is another token's
            outside = slots > last if unused is None else unused | (slots > last)
            positions, slots = positions.clamp(max=last), slots.clamp(max=last)
            seq_lens, bound = seq_lens.clamp(max=last + 1), bound.clamp(max=last + 1)
        if proposer.draft_vocab_size < proposer.vocab_size:
            tokens = tokens.clamp(max=proposer.draft_vocab_size - 1)  # it has no row for padding
        if self.skip_attn:
            return proposer._run_model(tokens, positions, None, None, None)
        mappings = proposer.block_tables.compute_slot_mappings(
            batch.idx_mapping, starts, slots, len(tokens), out=proposer.slots
        )
        if self.dummy_run:
            mappings.fill_(PAD_SLOT_ID)
        elif outside is not None:
            mappings.masked_fill_(outside, PAD_SLOT_ID)
        draft_pass = DraftPass(
            tokens, positions, mappings, starts, starts_np, seq_lens.to(torch.int32), bound, tree
        )
        graphs = proposer.graphs
        graph = graphs.fitting(draft_pass) if graphs and not self.dummy_run else None
        if graph is None:
            return draft_pass.run(proposer)
        return graphs.replay(graph, draft_pass)
