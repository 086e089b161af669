# SPDX-License-Identifier: Apache-2.0
"""A digest of source files, by which a record of a long run knows what it was a run of."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from helpers.pair import ROOT


def digest_of(files: Iterable[Path]) -> str:
    """Of the files' places in the repository and their contents."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
