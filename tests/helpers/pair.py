# SPDX-License-Identifier: Apache-2.0
"""The folders of the demo pair and of its head, and the prompts that tests give it."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
PAIR = SCRIPTS / "demo_pair"
TARGET, DRAFT = str(PAIR / "target"), str(PAIR / "draft")
EAGLE3 = str(PAIR / "eagle3")
EXIT_TARGET, NESTED = str(PAIR / "exit_target"), str(PAIR / "nested")

PROMPTS = [
    "def parse_header(line):\n",
    "x",
    "class Reader:\n    def __init__(self, stream):\n        self",
    'import os\nimport sys\n\n\ndef main():\n    """Run the',
    "    for key, value in sorted(items):\n        if key not in self._cache",
    "# Copyright (C) 2001 Python Software Foundation\n# Author: " + "a, b, c = 1, 2, 3\n" * 9,
]
