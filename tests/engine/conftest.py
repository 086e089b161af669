# SPDX-License-Identifier: Apache-2.0
"""Which model families are tried, and the record of all.

Those that are refused and a few others, or with `--all-families` all: such a run that passes is
recorded (`docs/models.json`), with a digest of what decides its outcome. The header of a run says
whether the record still fits.
"""

import json
from importlib.metadata import version

from model_families import FAMILIES, RECORD

from helpers.pair import ROOT
from helpers.sources import digest_of

PARTS = (
    "scripts/model_families.py",
    "tests/engine/test_families.py",
    "tests/helpers/models.py",
    "vllm_spechub/attention",
    "vllm_spechub/cpu/tree_kernels/attention.py",
    "vllm_spechub/cpu/tree_kernels/compaction.py",
    "vllm_spechub/engine",
    "vllm_spechub/proposers",
)


def tried_now() -> dict[str, str]:
    """What a run of all families would try."""
    paths = [ROOT / part for part in PARTS]
    files = [file for path in paths for file in (sorted(path.glob("*.py")) or [path])]
    versions = {name: version(name) for name in ("vllm", "transformers")}
    return {"sources": digest_of(files), **versions}


def pytest_addoption(parser):
    parser.addoption("--all-families", action="store_true", help="try every model family")


def pytest_configure(config):
    config.addinivalue_line("markers", "all_families: a family that is not tried in every run")


def pytest_report_header(config):
    recorded = json.loads(RECORD.read_text())
    fits = all(recorded.get(key) == value for key, value in tried_now().items())
    tried = "all" if config.getoption("--all-families") else "a few; --all-families tries all"
    return f"families: {tried}" + ("" if fits else ", which no longer are what was recorded")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all-families", False):
        left_out = [item for item in items if item.get_closest_marker("all_families")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    """Record a run in which every family that is not refused was tried, and nothing failed."""
    passed = terminalreporter.getreports("passed")
    seen = dict(value for report in passed for _, value in report.user_properties)
    wanted = {family.name for family in FAMILIES if family.refused is None}
    if exitstatus == 0 and seen.keys() == wanted:
        RECORD.write_text(json.dumps(tried_now() | {"families": seen}, indent=2) + "\n")
        terminalreporter.write_line(f"recorded in {RECORD.relative_to(ROOT)}")
