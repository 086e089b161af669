# SPDX-License-Identifier: Apache-2.0
"""Attention over paged KV caches with tree masks: what a token sees, and a backend per platform."""
