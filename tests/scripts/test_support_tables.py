# SPDX-License-Identifier: Apache-2.0
"""The tables of what works: complete, and every row with a test behind it."""

import json
import re

import msgspec
import pytest
import support_tables as support
from model_families import FAMILIES, RECORD
from vllm import SamplingParams

from helpers.pair import ROOT
from vllm_spechub.integration.versions import MODULES

TESTS = ROOT / "tests"
# set by vLLM itself, not by a request
INTERNAL = {"output_text_buffer_length", "skip_clone"}


def test_every_sampling_parameter_has_a_row():
    fields = {field.name for field in msgspec.structs.fields(SamplingParams)}
    wanted = {name for name in fields - INTERNAL if not name.startswith("_")}
    listed = [name for row in support.SAMPLING_PARAMETERS for name in row.names]
    assert len(listed) == len(set(listed))
    assert set(listed) == wanted


@pytest.mark.parametrize("title", support.TABLES)
def test_every_row_names_tests_that_exist(title):
    for row in support.TABLES[title]:
        assert row.tests or row.state not in ("works", "refused"), row.names
        for test in row.tests:
            file, _, name = test.partition("::")
            assert re.search(rf"^def {name}\(", (TESTS / file).read_text(), re.M), test


def test_every_supported_version_has_a_row():
    assert support.RUNS.keys() == MODULES.keys()


def test_every_family_was_tried():
    """Whoever adds one runs `pytest tests/engine/test_families.py --all-families`."""
    tried = {family.name for family in FAMILIES if family.refused is None}
    assert json.loads(RECORD.read_text())["families"].keys() == tried
