# SPDX-License-Identifier: Apache-2.0
"""Proposers, which draft a tree for every request."""
