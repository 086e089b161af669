# SPDX-License-Identifier: Apache-2.0
"""Attention over paged KV with a tree mask: what a token sees, and one backend per platform."""
