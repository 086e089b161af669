# SPDX-License-Identifier: Apache-2.0
"""Verification rules: how children are drawn and accepted, and what that is worth."""
