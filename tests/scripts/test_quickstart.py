# SPDX-License-Identifier: Apache-2.0
"""The quickstart's methods are ones that vLLM takes; CI has no time to run them."""

import pytest

from helpers.pair import SCRIPTS, TARGET
from vllm_spechub.measure import preflight


@pytest.mark.usefixtures("inspected_here")
def test_vllm_takes_every_method(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from quickstart import methods

    compared = methods("binary:3", 14)
    assert len(compared) == 4
    assert preflight.engine_refusals({"model": TARGET, "dtype": "float32"}, compared) == {}
    unknown = methods("binary:3", 14) | {"no such": {"method": "spechub", "model": "/nowhere"}}
    assert list(preflight.engine_refusals({"model": TARGET}, unknown)) == ["no such"]
