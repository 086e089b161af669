# SPDX-License-Identifier: Apache-2.0
"""What the doctor finds."""

from typing import NamedTuple

OK, WARNING, FAULT = "ok", "warning", "fault"


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    outcome: str
    """OK, WARNING (slower than need be) or FAULT (wrong or not running)."""
    found: str
    remedy: str = ""
    """What to do; empty if all is well."""
