# SPDX-License-Identifier: Apache-2.0
"""Trees without an engine: draft and verify, explain, simulate."""
