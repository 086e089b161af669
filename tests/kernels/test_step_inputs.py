# SPDX-License-Identifier: Apache-2.0
"""The inputs of a step: the kernels write what their references write, and nothing else."""

import pytest
import torch

from helpers.devices import DEVICE
from vllm_spechub.triton_kernels import step_inputs
from vllm_spechub.triton_kernels.step_inputs import DraftInputs, Layout, Verified, kernel

UNTOUCHED = -77


def filled(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.full(shape, UNTOUCHED, dtype=dtype, device=DEVICE)


def test_layout():
    """More tokens than a program has, and buffers that are longer."""
    num_tokens, room = kernel.BLOCK + 3, kernel.BLOCK + 9
    generator = torch.Generator().manual_seed(1)
    slots = torch.randint(2**31, 2**33, (num_tokens,), generator=generator)
    slots[::3] %= 2**30  # what is visible has 32 bits
    entries = torch.randint(0, 5, (num_tokens,), generator=generator).int()
    tables = torch.tensor([[0, 0, -1, -3, -4], [1, 0, -1, -2, -3], [0, 1, 3, 2**62 + 5, -(2**63)]])
    arguments = [table.to(DEVICE) for table in (slots, entries, *tables)]
    written = []
    for implementation in (kernel.lay_out, step_inputs.lay_out_reference):
        layout = Layout(filled(room), filled(room, dtype=torch.int32), filled(room))
        implementation(layout, *arguments)
        written.append(layout)
    for ours, reference in zip(*written, strict=True):
        assert torch.equal(ours[:num_tokens], reference[:num_tokens])
        assert (ours[num_tokens:] == UNTOUCHED).all()
    assert torch.equal(written[0].positions[:num_tokens].cpu() - slots, tables[0][entries.long()])


@pytest.mark.parametrize("width", [0, 3, 4])
def test_draft_inputs(width):
    """Batches with and without trees, of which some had rejected nodes, and padding requests."""
    most_reqs, rows = 5, 4
    nobody = 7
    requests = torch.tensor([[4, 0, 2, -1, -1], [1, 5, 0, nobody, nobody], [1, 0, 1, 0, 0]])
    paths = torch.tensor([[0, 2, 5, -1], [0, -1, -1, -1], [0, 1, 3, 6]], dtype=torch.int32)
    verified = Verified(
        positions=torch.arange(100, 130),
        query_start_loc=torch.tensor([0, 8, 9, 20], dtype=torch.int32),
        num_rejected=torch.tensor([5, 0, 7], dtype=torch.int32),
        paths=paths[:, :width].to(DEVICE) if width else None,
        temperature=torch.tensor([0.5, 9.0, 0.0, 9.0, 1.5]),
        seeds=torch.tensor([2**40, 9, -7, 9, -(2**50)]),
    )
    verified = Verified(*(None if v is None else v.to(DEVICE) for v in verified))
    written = []
    for implementation in (kernel.prepare_drafts, step_inputs.prepare_drafts_reference):
        inputs = DraftInputs(
            *(filled(most_reqs + 1) for _ in range(4)),
            sources=filled(most_reqs * rows + 2),
            temperature=filled(8, dtype=torch.float32),
            seeds=filled(8),
        )
        implementation(inputs, requests.to(DEVICE), verified, rows)
        written.append(inputs)
    for ours, reference in zip(*written, strict=True):
        assert torch.equal(ours, reference)
    ours = DraftInputs(*(value.cpu() for value in written[0]))
    assert ours.idx_mapping.tolist() == [4, 0, 2, -1, -1, UNTOUCHED]
    assert ours.first_positions.tolist() == [101, 108, 110, 0, 0, UNTOUCHED]
    assert ours.root_positions.tolist() == [103, 109, 113, 0, 0, UNTOUCHED]
    expected = [0, 2, 5, 5 if width == 3 else 0] if width else [0] * 4
    assert ours.sources[:rows].tolist() == expected
    assert ours.temperature.tolist() == [0, 1.5, *[UNTOUCHED] * 3, 0.5, UNTOUCHED, 0]
    assert ours.seeds.tolist() == [-7, -(2**50), *[UNTOUCHED] * 3, 2**40, UNTOUCHED, 0]
