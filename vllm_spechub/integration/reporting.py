# SPDX-License-Identifier: Apache-2.0
"""What an engine says about itself never stops it: summaries, metrics, log lines."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("vllm.spechub")

_failed: set[str] = set()


@contextmanager
def reporting(what: str) -> Iterator[None]:
    """Within, an error is logged, once for each kind of report, and goes no further."""
    try:
        yield
    except Exception:
        if what not in _failed:
            _failed.add(what)
            logger.exception("spechub: %s failed; the engine goes on without it", what)
