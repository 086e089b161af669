# SPDX-License-Identifier: Apache-2.0
"""What an engine says about itself never stops it, whatever goes wrong in it."""

from types import SimpleNamespace

import pytest
from vllm.v1.spec_decode.metrics import SpecDecodingLogging

from helpers.engines import engine, greedy_params, plain_greedy, token_ids
from helpers.pair import PROMPTS
from vllm_spechub.integration import reporting, scheduler, tree_metrics, worker

IN_THE_ENGINE = {
    "the start-up summary": (worker, "summarize"),
    "statistics of verified trees": (tree_metrics.StepObserver, "add_tree"),
    "statistics of steps without a tree": (scheduler.TreeScheduler, "_count_fallbacks"),
    "metrics of requests": (scheduler.TreeScheduler, "_tell_request_metrics"),
}
"""Reports of the engine's process, and the functions that make them."""
IN_THE_FRONTEND = {
    "metrics for Prometheus": (tree_metrics.TreeMetrics, "observe"),
    "the periodic log line": (tree_metrics.TreeLogging, "log"),
}
"""Reports of the process that talks to users."""


@pytest.fixture
def messages(monkeypatch):
    """What is logged about reports that fail."""
    monkeypatch.setattr(reporting, "_failed", set())
    found: list[str] = []
    logger = SimpleNamespace(exception=lambda form, *args: found.append(form % args))
    monkeypatch.setattr(reporting, "logger", logger)
    return found


@pytest.mark.parametrize("broken", [IN_THE_ENGINE, IN_THE_FRONTEND], ids=["engine", "frontend"])
def test_every_report_fails_and_the_engine_answers(broken, monkeypatch, messages):
    expected = plain_greedy()

    def fails(*args, **options):
        raise AttributeError("no such figure")

    for owner, name in broken.values():
        monkeypatch.setattr(owner, name, fails)
    with engine("binary:3", per_request_spec_decode_metrics="summary") as llm:
        found = token_ids(llm.generate(PROMPTS, greedy_params(), use_tqdm=False))
    lines = SpecDecodingLogging()
    lines.observe(tree_metrics.TreeDecodingStats.new(3))
    lines.log(lambda *args: None)
    assert found == expected
    # once each, though most fail in every step
    assert sorted(messages) == sorted(
        f"spechub: {what} failed; the engine goes on without it" for what in broken
    )


def test_what_is_no_failure_goes_on():
    with pytest.raises(KeyboardInterrupt), reporting.reporting("a report"):
        raise KeyboardInterrupt
