# SPDX-License-Identifier: Apache-2.0
"""A whole draft step as one CUDA graph: reading what was accepted, then every level of the tree.

A graph is captured for each tree of the schedule and each batch size that drafts it. It serves
steps in which every request decodes and none truncates its distribution; the others run pass by
pass (`cuda_graphs`).
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

from vllm_spechub.proposers.base import DraftStep
from vllm_spechub.rules.draft_state import DraftBuffers, DraftState
from vllm_spechub.triton_kernels.step_inputs import DraftInputs, Verified, prepare_drafts


class StepRunner(Protocol):
    """A proposer whose draft steps can be captured."""

    vllm_config: VllmConfig
    device: torch.device
    max_num_reqs: int
    dtype: torch.dtype
    # the width of the hidden states that a pass is fed, 0 if it reads tokens only
    fed_size: int
    input_buffers: InputBuffers
    draft_logits: DraftBuffers

    @property
    def max_model_len(self) -> int: ...

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
        """Read as many rows of each request, and draft its tree. It launches work and does nothing
        else: a capture records it."""
        ...


@dataclass(frozen=True)
class StepDescriptor(BatchExecutionDescriptor):
    """What a graph drafts, and for how many requests."""

    # the tree's place in the schedule
    tree: int = 0


class StepGraphs(CudaGraphManager):
    """Captures draft steps and replays them. A replay sees its batch through `inputs`, `fed`, the
    block tables and the requests' texts, and through nothing else.

    Args:
        proposer: the proposer that drafts, with its attention set up.
        sizes: by a tree's place in the schedule, the batch sizes to capture, ascending.
    """

    def __init__(self, proposer: StepRunner, sizes: Mapping[int, list[int]]) -> None:
        self.proposer, self.sizes = proposer, sizes
        self.states = proposer.draft_logits.states
        # [num_trees] whatever a tree's path has accepted, and the new root
        self.rows_per_req = [state.tree.depth + 1 for state in self.states]
        super().__init__(
            proposer.vllm_config,
            proposer.device,
            CUDAGraphMode.FULL_DECODE_ONLY,
            decode_query_len=max(self.rows_per_req),
        )
        device = proposer.device
        most_reqs = max(sizes[-1] for sizes in self.sizes.values())
        most_rows = max(self.rows_per_req[tree] * own[-1] for tree, own in sizes.items())
        reqs = torch.zeros(4, most_reqs, dtype=torch.int64, device=device)
        self.inputs = DraftInputs(
            *reqs,
            sources=torch.zeros(most_rows, dtype=torch.int64, device=device),
            # for trees whose requests' drafts stand in the rows of their states
            temperature=torch.zeros(proposer.max_num_reqs + 1, device=device),
            seeds=torch.zeros(proposer.max_num_reqs + 1, dtype=torch.int64, device=device),
        )
        self.fed: torch.Tensor | None = None
        if proposer.fed_size:
            self.fed = torch.zeros(
                most_rows, proposer.fed_size, dtype=proposer.dtype, device=device
            )
        # [most_reqs, num_nodes of the largest tree]
        self.tokens = torch.zeros(
            most_reqs, proposer.draft_logits.num_nodes, dtype=torch.int64, device=device
        )

    def _init_candidates(self) -> None:
        descs = [
            StepDescriptor(CUDAGraphMode.FULL, self.rows_per_req[tree] * size, size, tree=tree)
            for tree, sizes in self.sizes.items()
            for size in sizes
        ]
        # The widest first, because the others then fit into the memory of its graph.
        descs.sort(key=lambda desc: desc.num_tokens, reverse=True)
        self._capture_descs[CUDAGraphMode.FULL] = list(descs)

    def capture_steps(self) -> None:
        """Capture a graph for each tree and each batch size."""
        self.capture(self._captured, progress_bar_desc="Capturing draft steps")

    def _of(self, tree: int) -> DraftInputs:
        """The inputs of steps that draft a tree."""
        rows = self.states[tree].rows
        return (
            self.inputs
            if rows is None
            else self.inputs._replace(temperature=rows.temperature, seeds=rows.seeds)
        )

    def _nothing_verified(self) -> Verified:
        zeros = torch.zeros(1, dtype=torch.int64, device=self.device)
        return Verified(zeros, zeros.int(), zeros[:0].int(), None, zeros.float(), zeros)

    def _captured(
        self, desc: BatchExecutionDescriptor, warmup: bool
    ) -> Callable[[CUDAGraphMode], None]:
        """Prepare a step over the buffers. Returns the function that runs it within a capture."""
        assert isinstance(desc, StepDescriptor)  # made by `_init_candidates`
        assert desc.num_reqs is not None
        proposer, num_reqs = self.proposer, desc.num_reqs
        state, inputs = self.states[desc.tree], self._of(desc.tree)
        idx_mapping, draft_rows, first, root = (table[:num_reqs] for table in inputs[:4])
        # The kernel that fills the inputs is compiled here, for nobody.
        nobodys = np.empty(0, dtype=np.int64)
        self.prepare(desc, nobodys, nobodys, nobodys, self._nothing_verified())
        batch = InputBatch.make_dummy(num_reqs, num_reqs, proposer.input_buffers)
        lengths = torch.full((num_reqs,), proposer.max_model_len, dtype=torch.int32)
        step = DraftStep(
            batch=replace(batch, idx_mapping=idx_mapping, seq_lens_cpu_upper_bound=lengths),
            first_positions=first,
            root_positions=root,
            num_rejected=torch.zeros(num_reqs, dtype=torch.int32, device=self.device),
            hidden_states=torch.empty(0, device=self.device),
            aux_hidden_states=None,
            accepted_paths=None,
            dummy_run=False,
            skip_attn=False,
            captured=True,
            draft_rows=draft_rows,
        )
        fed = None if self.fed is None else self.fed[: desc.num_tokens]
        tokens = self.tokens[:num_reqs, : state.tree.num_nodes]

        def draft(_mode: CUDAGraphMode) -> None:
            proposer.draft_uniform(
                step, self.rows_per_req[desc.tree], fed, state, inputs.temperature, inputs.seeds
            )
            tokens.copy_(state.tokens[draft_rows])

        return draft

    def fitting(self, tree: int, num_reqs: int, num_rows: int) -> StepDescriptor | None:
        """The smallest graph that drafts a tree for so many requests and reads so many rows of
        each; None if there is none."""
        sizes = self.sizes.get(tree, [])
        place = bisect_left(sizes, num_reqs)
        rows = self.rows_per_req[tree]
        if not self._graphs_captured or place == len(sizes) or num_rows > rows:
            return None
        size = sizes[place]
        return StepDescriptor(CUDAGraphMode.FULL, rows * size, size, tree=tree)

    def prepare(
        self,
        desc: StepDescriptor,
        # [num_reqs] int64 each: the requests' states, the rows of their drafts, and how many of
        # their tokens need not be read again
        reqs: np.ndarray,
        draft_rows: np.ndarray,
        skipped: np.ndarray,
        verified: Verified,
    ) -> torch.Tensor:
        """Fill the inputs for a batch.

        Returns:
            Of each row of the batch's requests the token of the batch that gives the hidden state
            to feed, [num_reqs * rows_per_req] int64.
        """
        assert desc.num_reqs is not None
        rows_per_req = self.rows_per_req[desc.tree]
        nobody = len(self.states[desc.tree].tokens) - 1
        requests = np.zeros((3, desc.num_reqs), dtype=np.int64)
        requests[:2] = [[-1], [nobody]]
        requests[:, : len(reqs)] = reqs, draft_rows, skipped
        on_device = async_tensor_h2d(requests, device=self.device)
        prepare_drafts(self._of(desc.tree), on_device, verified, rows_per_req)
        return self.inputs.sources[: len(reqs) * rows_per_req]

    def replay(self, desc: StepDescriptor, num_reqs: int) -> torch.Tensor:
        """Draft by replaying a graph whose inputs are filled.

        Returns:
            Tokens [num_reqs, num_nodes of the largest tree], the drafted tree's first, valid until
            the next replay.
        """
        self.run_fullgraph(desc)
        return self.tokens[:num_reqs]
