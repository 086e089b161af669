# SPDX-License-Identifier: Apache-2.0
"""Index arithmetic for rows of different lengths; vLLM's kernels run a program per row instead."""

import numpy as np


def ragged_index(
    # [num_rows]
    counts: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The row of every element and its offset in that row, for rows laid end to end.

    Returns:
        [num_elements] each.

    Examples::

        >>> ragged_index(np.array([2, 0, 1]))
        (array([0, 0, 2]), array([0, 1, 0]))
    """
    rows = np.repeat(np.arange(counts.size), counts)
    firsts = np.cumsum(counts) - counts
    return rows, np.arange(rows.size) - firsts[rows]
