# SPDX-License-Identifier: Apache-2.0
"""Target distributions: what of several models' rows is verified, where it is not the target's
alone."""
