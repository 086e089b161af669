# SPDX-License-Identifier: Apache-2.0
"""Forward passes of a proposer's model as CUDA graphs.

vLLM 0.32 runs a separate draft model eagerly. Here a graph is captured for each captured batch size
and each number of rows per request that a pass may have: one row per expanded node of a depth, or,
if every request verified a whole tree, one per token that may have been accepted and one for the
new root.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_spechub.attention.visibility import TreeVisibility


@dataclass(frozen=True)
class DraftPass:
    """The inputs of one forward pass."""

    # [num_tokens] int32
    tokens: torch.Tensor
    # [num_tokens] int64, RoPE positions
    positions: torch.Tensor
    # [num_kv_cache_groups, num_tokens] int64
    slot_mappings: torch.Tensor
    # [num_reqs + 1] int32, each request's first row, on the device and on the host
    starts: torch.Tensor
    starts_np: np.ndarray
    # [num_reqs] int32
    seq_lens: torch.Tensor
    # [num_reqs] int32 on the host, upper bounds on `seq_lens`
    seq_lens_bound: torch.Tensor
    # None for ordinary causal tokens
    tree: TreeVisibility | None = None
    # [num_tokens, fed_size] hidden states; None for a model that reads tokens only
    fed: torch.Tensor | None = None


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


class PassGraphs(CudaGraphManager):
    """vLLM's graphs, for passes of `decode_query_len` rows per request."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, rows: int) -> None:
        super().__init__(vllm_config, device, CUDAGraphMode.FULL_DECODE_ONLY, decode_query_len=rows)

    def _init_candidates(self) -> None:
        rows, sizes = self.decode_query_len, self.compilation_config.cudagraph_capture_sizes
        self._capture_descs[CUDAGraphMode.FULL] = [
            BatchExecutionDescriptor(
                CUDAGraphMode.FULL, num_tokens=size * rows, num_reqs=size, uniform_token_count=rows
            )
            for size in sorted({min(size, self.max_num_reqs) for size in sizes}, reverse=True)
        ]

    def fitting(self, num_reqs: int) -> BatchExecutionDescriptor | None:
        """The smallest captured batch that has room for `num_reqs` requests."""
        num_tokens = num_reqs * self.decode_query_len
        fitting = [desc for desc in self.graphs if desc.num_tokens >= num_tokens]
        return min(fitting, key=lambda desc: desc.num_tokens, default=None)


class DraftGraphs:
    """Captures passes and replays them. A replay sees its batch through the buffers here, those of
    the attention backend, `proposer.slots` and the block tables, and through nothing else.

    Args:
        proposer: the proposer whose model runs, with its attention set up.
        rows_per_request: the numbers of rows per request that a pass may have.
    """

    def __init__(self, proposer: PassRunner, rows_per_request: Iterable[int]) -> None:
        self.proposer = proposer
        device, max_num_reqs = proposer.device, proposer.max_num_reqs
        # The widest first, because the others then fit into the memory of its graphs.
        self.by_rows = {
            rows: PassGraphs(proposer.vllm_config, device, rows)
            for rows in sorted(set(rows_per_request), reverse=True)
        }
        max_num_tokens = max_num_reqs * max(self.by_rows)
        self.tokens = torch.zeros(max_num_tokens, dtype=torch.int32, device=device)
        self.positions = torch.zeros(max_num_tokens, dtype=torch.int64, device=device)
        self.starts = torch.zeros(max_num_reqs + 1, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self.fed: torch.Tensor | None = None
        if proposer.fed_size:
            self.fed = torch.zeros(
                max_num_tokens, proposer.fed_size, dtype=proposer.dtype, device=device
            )
        # [max_num_tokens, ..., hidden_size], made by the first pass
        self.hidden: torch.Tensor | None = None

    def capture(self) -> None:
        """Capture a graph for each number of rows per request and each batch size."""
        for rows, graphs in self.by_rows.items():
            title = f"Capturing draft CUDA graphs, {rows} rows per request"
            graphs.capture(partial(self._captured, rows), progress_bar_desc=title)

    def _captured(
        self, rows: int, desc: BatchExecutionDescriptor, warmup: bool
    ) -> Callable[[CUDAGraphMode], None]:
        """Prepare a pass over the buffers. Returns the function that runs it within a capture."""
        proposer, num_tokens = self.proposer, desc.num_tokens
        num_reqs = num_tokens // rows
        starts_np = np.arange(num_reqs + 1, dtype=np.int32) * rows
        self.starts[: num_reqs + 1] = async_tensor_h2d(starts_np, device=proposer.device)
        proposer.slots.fill_(PAD_SLOT_ID)
        dummy = DraftPass(
            self.tokens[:num_tokens],
            self.positions[:num_tokens],
            proposer.slots[:, :num_tokens],
            self.starts[: num_reqs + 1],
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
        """The graph for a pass; None if none was captured for its numbers of rows and requests."""
        counts = np.diff(draft_pass.starts_np)
        graphs = self.by_rows.get(int(counts[0]))
        if graphs is None or (counts != counts[0]).any():
            return None
        return graphs.fitting(len(counts))

    def replay(self, desc: BatchExecutionDescriptor, draft_pass: DraftPass) -> torch.Tensor:
        """Run a pass by replaying its graph.

        Returns:
            Hidden states [num_tokens, ..., hidden_size], valid until the next replay.
        """
        num_tokens, num_reqs = len(draft_pass.tokens), len(draft_pass.seq_lens)
        # This fills the attention backend's buffers. The capture already holds what it returns.
        self.proposer.attention(draft_pass)
        self.tokens[:num_tokens] = draft_pass.tokens
        self.positions[:num_tokens] = draft_pass.positions
        if self.fed is not None:
            assert draft_pass.fed is not None  # what the proposer's `fed_size` says
            self.fed[:num_tokens] = draft_pass.fed
        self.starts[: num_reqs + 1] = draft_pass.starts
        self.seq_lens[:num_reqs] = draft_pass.seq_lens
        # Padding requests have no rows; their slots are padding already.
        self.starts[num_reqs + 1 :] = num_tokens
        self.seq_lens[num_reqs:] = 0
        self.by_rows[num_tokens // num_reqs].run_fullgraph(desc)
        assert self.hidden is not None  # since the first capture
        return self.hidden[:num_tokens]
