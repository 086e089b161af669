# SPDX-License-Identifier: Apache-2.0
"""`ModelProposer`, the base class of proposers with a network and KV cache layers of their own.

Nodes live in consecutive slots after the root in breadth-first order and see their ancestors only.
The next step writes the accepted tokens again, in their final slots, so the draft's KV cache needs
no compaction.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from vllm_spechub.attention.visibility import TreeAttnMetadata, TreeVisibility
from vllm_spechub.engine.member_pass import with_own_window
from vllm_spechub.engine.truncation import truncates
from vllm_spechub.proposers.base import Carried, DraftStep, TreeProposer
from vllm_spechub.proposers.cuda_graphs import DraftGraphs, DraftPass, batch_sizes
from vllm_spechub.proposers.step_graphs import StepGraphs
from vllm_spechub.rules.base import VerificationRule
from vllm_spechub.rules.draft_state import DraftLevel, DraftState
from vllm_spechub.trees.tree import Tree
from vllm_spechub.triton_kernels.step_inputs import Verified


class FedRows(NamedTuple):
    """The rows of a batch that a network reads before it drafts, a request's side by side."""

    # [num_reqs + 1] int32, each request's first row
    starts: torch.Tensor
    # [num_rows] int64, the row's request, and its place among the request's rows
    req: torch.Tensor
    local: torch.Tensor
    # [num_reqs + 1] int32, `starts` on the host
    starts_np: np.ndarray

    def of(self, num_reqs: int, each: int) -> "FedRows":
        """Those of the first requests, which have `each` rows."""
        bounds, rows = slice(num_reqs + 1), slice(num_reqs * each)
        return FedRows(
            self.starts[bounds], self.req[rows], self.local[rows], self.starts_np[bounds]
        )


class ModelProposer(TreeProposer[Carried], DraftModelSpeculator):
    """A proposer that runs forward passes over trees: their slots, attention and CUDA graphs.

    A subclass loads the network (`load_draft_model`) and calls it (`run_model`).

    Attributes:
        captures_steps: whether a whole step may be one CUDA graph: `read` does what `feed` does,
            and `level_logits` only launches work.
        shift: by how much the position and the KV slot of a token's row are lower than the token's
            own: 1 for networks that read a token together with the hidden state before it.
        fed_size: the width of the hidden states that a pass is fed, 0 if it reads tokens only.
    """

    follows_levels: ClassVar[bool] = True
    captures_steps: ClassVar[bool] = False
    shift: ClassVar[int] = 0
    fed_size: int = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # What a subclass changes may need the host, unless it says that it does not.
        own = vars(cls).keys()
        if own & {"read", "level_logits"} and "captures_steps" not in own:
            cls.captures_steps = False

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, rule: VerificationRule
    ) -> None:
        # First the constructor of vLLM's speculator, then ours: of what both set, ours must remain.
        super(TreeProposer, self).__init__(vllm_config, device)
        # The draft's vocabulary may be padded to another size than the target's.
        self.draft_vocab_size = self.vocab_size
        TreeProposer.__init__(self, vllm_config, device, rule)
        self.graphs: DraftGraphs | None = None
        self.step_graphs: StepGraphs | None = None
        # by the number of rows per request, of as many requests as there may be
        self.uniform_rows: dict[int, FedRows] = {}
        # [num_kv_cache_groups, most rows of a pass] int64, made by `set_attn`
        self.slots: torch.Tensor

    def logits_dtype(self) -> torch.dtype:
        """The network's own dtype, as verification must see the logits that children came from."""
        dtype, _ = self.draft_logits_spec(self.vllm_config)
        return dtype

    @abstractmethod
    def run_model(
        self,
        # [num_tokens] int32
        tokens: torch.Tensor,
        # [num_tokens] int64, RoPE positions
        positions: torch.Tensor,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        # [num_tokens, fed_size]
        fed: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run the network once. Returns hidden states, one or several per token, [num_tokens, ...,
        hidden_size]."""

    @contextmanager
    def own_sliding_window(self) -> Iterator[None]:
        """Within, a network that is loaded has its own sliding window, where vLLM would give it the
        target's."""
        shared = self.vllm_config
        self.vllm_config = with_own_window(shared, self.draft_model_config)
        try:
            yield
        finally:
            self.vllm_config = shared

    def compute_draft_logits(
        self,
        # [num_rows, hidden_size]
        hidden_states: torch.Tensor,
        spec_step_idx: int,
    ) -> torch.Tensor:
        """Compute logits over the target's vocabulary, [num_rows, vocab_size].

        The draft's padding beyond that vocabulary is cut off, and tokens that the draft lacks get
        -inf, so that they are never drafted.
        """
        logits = super().compute_draft_logits(hidden_states, spec_step_idx)
        missing = self.vocab_size - self.draft_vocab_size
        if missing:
            logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        return logits

    def rows_of(self, tree: Tree) -> Iterator[int]:
        """The numbers of rows per request of the passes that expand a tree."""
        yield from map(len, tree.internal_levels()[1:])
        # Those of `read`, after a whole tree: as many as may have been emitted.
        yield tree.depth + 1

    def rows_per_request(self) -> dict[int, int]:
        """By the number of rows per request that a pass may have if no request reads its prompt,
        the most requests that it is captured for: as many as the schedule drafts such a tree for,
        if the target's own pass over the trees is a graph and the draft's is not too wide."""
        most: dict[int, int] = {}
        tokens = self.vllm_config.compilation_config.max_cudagraph_capture_size or 0
        for tree, reqs in self.schedule.most_requests(self.max_num_reqs).items():
            in_graph = min(reqs, tokens // (1 + tree.num_nodes))
            for rows in self.rows_of(tree):
                fitting = min(in_graph, self.max_num_tokens // rows)
                most[rows] = max(most.get(rows, 0), fitting)
        return most

    def set_attn(
        self,
        model_state: ModelState,
        kv_cache_config: KVCacheConfig,
        block_tables: BlockTables,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().set_attn(model_state, kv_cache_config, block_tables, *args, **kwargs)
        self.slots = torch.empty(
            block_tables.num_kv_cache_groups,
            self.max_num_tokens,
            dtype=torch.int64,
            device=self.device,
        )

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        self.graphs = self.step_graphs = None
        if cudagraph_mode.decode_mode() != CUDAGraphMode.FULL:
            return
        rows_per_request = self.rows_per_request()
        if any(rows_per_request.values()):
            self.graphs = DraftGraphs(self, rows_per_request)
        sizes = {tree: batch_sizes(most) for tree, most in enumerate(self.captured_requests())}
        if self.captures_steps and self.rule.captures and any(sizes.values()):
            self.step_graphs = StepGraphs(self, {tree: own for tree, own in sizes.items() if own})

    def capture(self) -> None:
        if self.graphs is not None:
            self.graphs.capture_passes()
        if self.step_graphs is not None:
            self.step_graphs.capture_steps()

    def replay_step(
        self,
        batch: InputBatch,
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
        graphs, trees, reqs = self.step_graphs, self.request_trees, batch.idx_mapping_np
        drafts = batch.num_draft_tokens_per_req
        if drafts is None:
            drafts = np.zeros_like(reqs)
        lengths, prefills = batch.num_scheduled_tokens[: len(reqs)], batch.is_prefilling_np
        decodes = not prefills[: len(reqs)].any() and bool((lengths == drafts + 1).all())
        if (
            graphs is None
            or not decodes
            or trees.draft_lag(reqs).any()
            or truncates(self.sampling_states, reqs).any()
        ):
            return None
        desc = graphs.fitting(tree, len(reqs), int(trees.depths_for(reqs).max()) + 1)
        if desc is None:
            return None
        paths = trees.accepted_paths(batch)
        trees.record_drafted(reqs, tree)
        own_rows = self.draft_logits.states[tree].rows is None
        sources = graphs.prepare(
            desc,
            reqs,
            reqs if own_rows else trees.draft_rows_for(reqs),
            self.already_read(drafts),
            Verified(
                batch.positions,
                batch.query_start_loc,
                num_rejected,
                paths,
                temperature,
                seeds,
            ),
        )
        if graphs.fed is not None:
            states = self.target_states(hidden_states, aux_hidden_states, sources)
            graphs.fed[: len(sources)] = states
        if self.schedule.pauses:
            roots = graphs.inputs.root_positions[: len(reqs)]
            trees.record_read(batch.idx_mapping, roots)
        return graphs.replay(desc, len(reqs))

    def already_read(
        self,
        # [num_reqs] how many nodes each request's tree had
        drafts: np.ndarray,
    ) -> np.ndarray:
        """How many of the tokens that a request has in the batch need not be read again, if all
        requests decode. [num_reqs]"""
        return np.zeros_like(drafts)

    def target_states(
        self,
        # [num_tokens, hidden_size]
        hidden_states: torch.Tensor,
        # each [num_tokens, hidden_size]
        aux_hidden_states: list[torch.Tensor] | None,
        # [num_rows] int64, tokens of the target's batch
        tokens: torch.Tensor,
    ) -> torch.Tensor:
        """What a network with a `fed_size` is fed of the target's hidden states. [num_rows,
        fed_size]"""
        raise NotImplementedError(f"{type(self).__name__} reads no hidden states")

    def captured_requests(self) -> list[int]:
        """For each tree of the schedule, the most requests of a step that is captured whole, 0 if
        none is: as many as its widest pass is captured for, if one set of logits holds them."""
        per_pass = self.rows_per_request()
        return [
            min(
                reqs,
                *(per_pass[rows] for rows in self.rows_of(tree)),
                self.max_rows // max(map(len, tree.internal_levels())),
            )
            for tree, reqs in self.schedule.most_requests(self.max_num_reqs).items()
        ]

    def draft_uniform(
        self,
        step: DraftStep,
        rows_per_req: int,
        # [num_reqs * rows_per_req, fed_size]
        fed: torch.Tensor | None,
        state: DraftState,
        # [num_draft_rows]
        temperature: torch.Tensor,
        # [num_draft_rows]
        seeds: torch.Tensor,
    ) -> None:
        """Read as many rows of each request, and draft its tree."""
        rows = self.fed_rows(np.full(step.num_reqs, rows_per_req))
        roots: Any = self.feed(step, rows, step.first_positions, fed)
        self.draft(step, roots, state, temperature, seeds)

    def made_uniform(
        self,
        step: DraftStep,
        # [num_reqs]
        counts: np.ndarray,
    ) -> np.ndarray:
        """The numbers of rows of `read`, the same for all requests if a graph may run them: a few
        unused rows make a batch uniform, unless it then exceeds what a pass may hold. [num_reqs]"""
        if self.graphs is None or step.batch.is_prefilling_np.any():
            return counts
        rows = int(self.request_trees.depths_for(step.batch.idx_mapping_np).max()) + 1
        return np.full_like(counts, rows) if rows * len(counts) <= self.max_num_tokens else counts

    def fed_rows(
        self,
        # [num_reqs] the numbers of rows
        counts: np.ndarray,
    ) -> FedRows:
        """The rows of `read`."""
        num_reqs, most = len(counts), int(counts.max())
        # At most a whole path for each request: the tables of such batches are kept.
        uniform = most <= self.schedule.depth + 1 and bool((counts == most).all())
        if uniform and most in self.uniform_rows:
            return self.uniform_rows[most].of(num_reqs, most)
        if uniform:
            counts = np.full(self.max_num_reqs, most)
        starts_np = np.zeros(len(counts) + 1, dtype=np.int32)
        np.cumsum(counts, out=starts_np[1:])
        req_np = np.repeat(np.arange(len(counts)), counts)
        local_np = np.arange(starts_np[-1]) - starts_np[req_np]
        rows = FedRows(
            async_tensor_h2d(starts_np, device=self.device),
            async_tensor_h2d(req_np, device=self.device),
            async_tensor_h2d(local_np, device=self.device),
            starts_np,
        )
        if uniform:
            self.uniform_rows[most] = rows
            return rows.of(num_reqs, most)
        return rows

    def feed(
        self,
        step: DraftStep,
        rows: FedRows,
        # [num_reqs] int64, the position of each request's first row
        first: torch.Tensor,
        # [num_rows, fed_size]
        fed: torch.Tensor | None = None,
        lagging: bool = False,
    ) -> torch.Tensor:
        """Feed tokens that the target has accepted, up to each request's root. Rows past it write
        nothing, and see no more than it does.

        Args:
            lagging: whether some requests' rows end before their roots. They draft from their last
                rows.

        Returns:
            What `run_model` gives for the roots, [num_reqs, ..., hidden_size].
        """
        # the last row that is read of each request
        last = step.root_positions - self.shift if self.shift else step.root_positions
        end = first + torch.diff(rows.starts)
        positions = first[rows.req] + rows.local
        lasts = last[rows.req]
        if step.dummy_run:
            tokens = torch.zeros_like(positions, dtype=torch.int32)
        else:
            read = positions + self.shift if self.shift else positions
            owners = step.batch.idx_mapping[rows.req]
            tokens = self.req_states.all_token_ids.gpu[
                owners, read.clamp(max=self.max_model_len - 1)
            ]
        given = self.run_pass(
            step,
            tokens,
            positions,
            positions,
            rows.starts,
            rows.starts_np,
            end,
            positions > lasts,
            self.up_to_roots(step, np.diff(rows.starts_np), positions, lasts),
            fed,
        )
        if lagging:
            last = torch.minimum(last, end - 1)
        return given[rows.starts[:-1] + last - first]

    def up_to_roots(
        self,
        step: DraftStep,
        # [num_reqs] the numbers of rows
        counts: np.ndarray,
        # [num_tokens] the rows' positions
        positions: torch.Tensor,
        # [num_tokens] the position of the last token that is read of each row's request
        last: torch.Tensor,
    ) -> TreeVisibility | None:
        """What the rows of `read` see; None if each is a token, and sees those before it.

        Rows past the last token write nothing, so what stands in their slots is nobody's. They may
        see no more than the last token does.
        """
        prefills = step.batch.is_prefilling_np[: step.num_reqs]
        if prefills.all() or (self.device.type == "cpu" and self.graphs is None):
            return None
        visible_until = torch.empty_like(positions, dtype=torch.int32)
        return TreeVisibility(
            visible_until=torch.add(torch.minimum(positions, last), 1, out=visible_until),
            tree_mask=torch.zeros_like(positions),
            num_tree_tokens=np.where(prefills, 0, counts),
        )

    def level_logits(
        self, step: DraftStep, depth: int, level: DraftLevel, state: DraftState, carried: Any
    ) -> tuple[torch.Tensor, Any]:
        """As for any proposer, for a network that reads tokens only. It carries hidden states,
        [num_reqs * num_expanded, hidden_size]; at depth 0 they are those of the roots."""
        hidden = carried if depth == 0 else self.run_level(step, depth, level, state)
        return self.compute_draft_logits(hidden, depth), hidden

    def run_level(
        self,
        step: DraftStep,
        depth: int,
        level: DraftLevel,
        state: DraftState,
        # [num_reqs * num_expanded, fed_size]
        fed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Feed the nodes of one depth below the root.

        Returns:
            Hidden states [num_reqs * num_expanded, ..., hidden_size].
        """
        num_reqs, num_expanded = step.num_reqs, len(level.nodes_np)
        # [num_reqs, 1]
        root = (step.root_positions - self.shift).unsqueeze(1)
        visible_until = torch.empty(num_reqs, num_expanded, dtype=torch.int32, device=self.device)
        tree = TreeVisibility(
            visible_until=visible_until.copy_(root).flatten(),
            tree_mask=level.rows(num_reqs).ancestor_masks,
            num_tree_tokens=np.full(num_reqs, num_expanded),
        )
        return self.run_pass(
            step,
            self.node_tokens(step, depth, level, state),
            (root + level.depths).flatten(),
            (root + level.nodes).flatten(),
            level.starts[: num_reqs + 1],
            level.starts_np[: num_reqs + 1],
            root.squeeze(1) + (int(level.nodes_np[-1]) + 1),
            None,
            tree,
            fed,
        )

    def run_pass(
        self,
        step: DraftStep,
        # [num_tokens] integers
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
        # [num_tokens] bool, rows that must write nothing
        unused: torch.Tensor | None,
        # None for ordinary causal tokens
        tree: TreeVisibility | None,
        # [num_tokens, fed_size]
        fed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run one forward pass, eagerly or by replaying a graph.

        Positions and slots beyond the engine's maximal length are never used.

        Returns:
            Hidden states [num_tokens, ..., hidden_size], valid until the next pass.
        """
        batch, last = step.batch, self.max_model_len - 1
        # The bound covers this step's tokens; a new tree adds its root and its nodes.
        nodes = self.schedule.trees[0].num_nodes
        bound = batch.seq_lens_cpu_upper_bound.numpy()[: step.num_reqs] + (nodes + 1)
        outside = unused
        if int(bound.max()) > last:
            # There are no slots beyond the last, which belongs to another token.
            outside = slots > last if unused is None else unused | (slots > last)
            positions, slots = positions.clamp(max=last), slots.clamp(max=last)
            seq_lens, bound = seq_lens.clamp(max=last + 1), bound.clip(max=last + 1)
        if self.draft_vocab_size < self.vocab_size:
            tokens = tokens.clamp(max=self.draft_vocab_size - 1)  # it has no rows for the others
        if step.skip_attn:
            return self.run_model(tokens.to(torch.int32), positions, None, None, fed)
        mappings = self.block_tables.compute_slot_mappings(
            batch.idx_mapping, starts, slots, len(tokens), out=self.slots
        )
        if step.dummy_run:
            mappings.fill_(PAD_SLOT_ID)
        elif outside is not None:
            mappings.masked_fill_(outside, PAD_SLOT_ID)
        draft_pass = DraftPass(
            tokens,
            positions,
            mappings,
            starts,
            starts_np,
            seq_lens,
            torch.from_numpy(bound),
            tree,
            fed,
            step.first_req,
        )
        graphs = self.graphs
        eager = step.dummy_run or step.captured
        graph = graphs.fitting(draft_pass) if graphs and not eager else None
        if graphs is None or graph is None:
            draft_pass = dataclasses.replace(draft_pass, seq_lens=seq_lens.to(torch.int32))
            metadata = self.attention(draft_pass)
            return self.run_model(tokens.to(torch.int32), positions, *metadata, fed)
        return graphs.replay(graph, draft_pass)

    def attention(
        self, draft_pass: DraftPass, for_capture: bool = False
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """A pass's attention metadata and KV slots, by layer."""
        num_reqs, tree = len(draft_pass.seq_lens), draft_pass.tree
        in_batch = slice(draft_pass.first_req, draft_pass.first_req + num_reqs)
        metadata = build_attn_metadata(
            attn_groups=self.attn_groups,
            num_reqs=num_reqs,
            num_tokens=len(draft_pass.tokens),
            query_start_loc_gpu=draft_pass.starts,
            query_start_loc_cpu=torch.from_numpy(draft_pass.starts_np),
            max_query_len=int(np.diff(draft_pass.starts_np).max()),
            seq_lens=draft_pass.seq_lens,
            max_seq_len=self.max_model_len,
            block_tables=[table[in_batch] for table in self.block_tables.input_block_tables],
            slot_mappings=draft_pass.slot_mappings,
            kv_cache_config=self.kv_cache_config,
            seq_lens_cpu_upper_bound=draft_pass.seq_lens_bound,
            positions=draft_pass.positions,
            is_prefilling=self.draft_is_prefilling[:num_reqs],
            model_specific_attn_metadata=None if tree is None else TreeAttnMetadata(tree),
            for_cudagraph_capture=for_capture,
        )
        slot_mappings = build_slot_mappings_by_layer(draft_pass.slot_mappings, self.kv_cache_config)
        return metadata, slot_mappings
