# SPDX-License-Identifier: Apache-2.0
"""Which tree is drafted, and when: shapes, the best shape for a number of nodes, schedules."""
