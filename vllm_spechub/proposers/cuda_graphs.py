# SPDX-License-Identifier: Apache-2.0
"""Forward passes of a proposer's model as CUDA graphs.

vLLM 0.32 runs a separate draft model eagerly. Here a graph is captured for each number of rows per
request that a pass may have: one row per expanded node of a depth, or, if every request verified a
whole tree, one per token that may have been accepted and one for the new root. And for each of
these, for the batch sizes that draft such a tree.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_spechub.attention.visibility import TreeVisibility


@dataclass(frozen=True)
class DraftPass:
    """The inputs of one forward pass."""

    # [num_tokens] integers
    tokens: torch.Tensor
    # [num_tokens] int64, RoPE positions
    positions: torch.Tensor
    # [num_kv_cache_groups, num_tokens] int64
    slot_mappings: torch.Tensor
    # [num_reqs + 1] int32, each request's first row, on the device and on the host
    starts: torch.Tensor
    starts_np: np.ndarray
    # [num_reqs] integers
    seq_lens: torch.Tensor
    # [num_reqs] int32 on the host, upper bounds on `seq_lens`
    seq_lens_bound: torch.Tensor
    # None for ordinary causal tokens
    tree: TreeVisibility | None = None
    # [num_tokens, fed_size] hidden states; None for a model that reads tokens only
    fed: torch.Tensor | None = None
    # where the first request stands in the batch, as the block tables do
    first_req: int = 0


class PassRunner(Protocol):
    """A proposer whose passes can be captured."""

    vllm_config: VllmConfig
    device: torch.device
    max_num_reqs: int
    dtype: torch.dtype
    # the width of the hidden states that a pass is fed, 0 if it reads tokens only
    fed_size: int
    # [num_kv_cache_groups, most rows of a pass] int64
    slots: torch.Tensor

    def attention(
        self, draft_pass: DraftPass, for_capture: bool = False
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """A pass's attention metadata and KV slots, by layer."""
        ...

    def run_model(
        self,
        # [num_tokens] int32
        tokens: torch.Tensor,
        # [num_tokens] int64
        positions: torch.Tensor,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        # [num_tokens, fed_size]
        fed: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run the model once. Returns hidden states, one or several per token, [num_tokens, ...,
        hidden_size]."""
        ...


def batch_sizes(most: int) -> list[int]:
    """The batch sizes to capture up to a largest one: 1, 2, 4, every 8, and the largest."""
    return sorted({size for size in (1, 2, 4, *range(8, most, 8), most) if size <= most})


class DraftGraphs(CudaGraphManager):
    """Captures passes and replays them. A replay sees its batch through the buffers here, those of
    the attention backend, `proposer.slots` and the block tables, and through nothing else.

    It is a manager of vLLM's, so that vLLM drops the graphs that it has captured to learn how much
    memory they take.

    Args:
        proposer: the proposer whose model runs, with its attention set up.
        rows_per_request: by the number of rows per request that a pass may have, the most requests
            of such a pass.
    """

    def __init__(self, proposer: PassRunner, rows_per_request: Mapping[int, int]) -> None:
        self.sizes = {rows: batch_sizes(most) for rows, most in rows_per_request.items() if most}
        widest = max(self.sizes)
        super().__init__(
            proposer.vllm_config,
            proposer.device,
            CUDAGraphMode.FULL_DECODE_ONLY,
            decode_query_len=widest,
        )
        self.proposer = proposer
        device, max_num_reqs = proposer.device, proposer.max_num_reqs
        max_num_tokens = max(rows * sizes[-1] for rows, sizes in self.sizes.items())
        self.tokens = torch.zeros(max_num_tokens, dtype=torch.int32, device=device)
        self.positions = torch.zeros(max_num_tokens, dtype=torch.int64, device=device)
        # by the number of rows per request: [most + 1], each request's first row
        self.starts = {
            rows: torch.arange(sizes[-1] + 1, dtype=torch.int32, device=device) * rows
            for rows, sizes in self.sizes.items()
        }
        self.seq_lens = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self.fed: torch.Tensor | None = None
        if proposer.fed_size:
            self.fed = torch.zeros(
                max_num_tokens, proposer.fed_size, dtype=proposer.dtype, device=device
            )
        # [max_num_tokens, ..., hidden_size], made by the first pass
        self.hidden: torch.Tensor | None = None

    def _init_candidates(self) -> None:
        descs = [self._descriptor(r, size) for r, sizes in self.sizes.items() for size in sizes]
        # The widest first, because the others then fit into the memory of its graph.
        descs.sort(key=lambda desc: desc.num_tokens, reverse=True)
        self._capture_descs[CUDAGraphMode.FULL] = descs

    @staticmethod
    def _descriptor(rows: int, num_reqs: int) -> BatchExecutionDescriptor:
        return BatchExecutionDescriptor(
            CUDAGraphMode.FULL, rows * num_reqs, num_reqs, uniform_token_count=rows
        )

    def capture_passes(self) -> None:
        """Capture a graph for each number of rows per request and each batch size."""
        self.capture(self._captured, progress_bar_desc="Capturing draft CUDA graphs")

    def _captured(
        self, desc: BatchExecutionDescriptor, warmup: bool
    ) -> Callable[[CUDAGraphMode], None]:
        """Prepare a pass over the buffers. Returns the function that runs it within a capture."""
        proposer, num_tokens = self.proposer, desc.num_tokens
        num_reqs = desc.num_reqs or 0
        rows = num_tokens // num_reqs
        starts_np = np.arange(num_reqs + 1, dtype=np.int32) * rows
        proposer.slots.fill_(PAD_SLOT_ID)
        dummy = DraftPass(
            self.tokens[:num_tokens],
            self.positions[:num_tokens],
            proposer.slots[:, :num_tokens],
            self.starts[rows][: num_reqs + 1],
            starts_np,
            self.seq_lens[:num_reqs],
            torch.ones(num_reqs, dtype=torch.int32),
            fed=None if self.fed is None else self.fed[:num_tokens],
        )
        metadata = proposer.attention(dummy, for_capture=True)

        def forward(_mode: CUDAGraphMode) -> None:
            hidden = proposer.run_model(dummy.tokens, dummy.positions, *metadata, dummy.fed)
            if self.hidden is None:
                self.hidden = hidden.new_zeros(len(self.tokens), *hidden.shape[1:])
            self.hidden[:num_tokens] = hidden

        return forward

    def fitting(self, draft_pass: DraftPass) -> BatchExecutionDescriptor | None:
        """The smallest graph that has room for a pass; None if none was captured for as many rows
        per request."""
        counts = np.diff(draft_pass.starts_np)
        sizes = self.sizes.get(int(counts[0]))
        # A graph reads the block tables from their first row on.
        if not self._graphs_captured or draft_pass.first_req or sizes is None:
            return None
        place = bisect_left(sizes, len(counts))
        if place == len(sizes) or (counts != counts[0]).any():
            return None
        return self._descriptor(int(counts[0]), sizes[place])

    def replay(self, desc: BatchExecutionDescriptor, draft_pass: DraftPass) -> torch.Tensor:
        """Run a pass by replaying its graph.

        Returns:
            Hidden states [num_tokens, ..., hidden_size], valid until the next replay.
        """
        num_tokens, num_reqs = len(draft_pass.tokens), len(draft_pass.seq_lens)
        self.tokens[:num_tokens] = draft_pass.tokens
        self.positions[:num_tokens] = draft_pass.positions
        if self.fed is not None:
            assert draft_pass.fed is not None  # what the proposer's `fed_size` says
            self.fed[:num_tokens] = draft_pass.fed
        self.seq_lens[:num_reqs] = draft_pass.seq_lens
        if desc.num_reqs != num_reqs:
            # Padding requests see nothing; their slots are padding already.
            self.seq_lens[num_reqs : desc.num_reqs] = 0
        # This fills the attention backend's buffers. The capture already holds what it returns.
        self.proposer.attention(replace(draft_pass, seq_lens=self.seq_lens[:num_reqs]))
        self.run_fullgraph(desc)
        assert self.hidden is not None  # since the first capture
        return self.hidden[:num_tokens]
