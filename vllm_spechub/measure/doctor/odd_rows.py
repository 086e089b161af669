# SPDX-License-Identifier: Apache-2.0
"""Rows of logits that no sound model gives: what a fault leaves behind."""

from collections.abc import Callable

import torch

NAN, INF = float("nan"), float("inf")


def _set(value: float, *tokens: int) -> Callable[[torch.Tensor], None]:
    def change(row: torch.Tensor) -> None:
        row[list(tokens)] = value

    return change


ODD_ROWS: dict[str, Callable[[torch.Tensor], object]] = {
    "one NaN": _set(NAN, 1),
    "one +inf": _set(INF, 2),
    "two +inf": _set(INF, 1, 2),
    "one -inf": _set(-INF, 0),
    "all NaN": lambda row: row.fill_(NAN),
    "all +inf": lambda row: row.fill_(INF),
    "all -inf": lambda row: row.fill_(-INF),
    "NaN, but for one": lambda row: row[:-1].fill_(NAN),
    "NaN and -inf": lambda row: row.fill_(-INF)[::2].fill_(NAN),
    "the largest numbers": lambda row: row.fill_(torch.finfo(row.dtype).max)[1::2].neg_(),
}
"""In place, of one row [vocab_size]."""
