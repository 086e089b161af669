# SPDX-License-Identifier: Apache-2.0
"""Proposers: what drafts a tree for every request."""
