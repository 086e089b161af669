# SPDX-License-Identifier: Apache-2.0
"""What a draft is, before it is loaded: its kind, and whether it speaks the target's vocabulary."""
