# SPDX-License-Identifier: Apache-2.0
"""What an engine says about itself never stops it, whatever goes wrong in it."""

import logging

import pytest

from helpers.engines import engine, greedy_params, plain_greedy, token_ids
from helpers.pair import PROMPTS
from vllm_spechub.integration import reporting, scheduler, tree_metrics, worker

BROKEN = {
    "the start-up summary": (worker, "summarize"),
    "statistics of verified trees": (tree_metrics.StepObserver, "add_tree"),
    "statistics of steps without a tree": (scheduler.TreeScheduler, "_count_fallbacks"),
    "metrics of requests": (scheduler.TreeScheduler, "_tell_request_metrics"),
    "metrics for Prometheus": (tree_metrics.TreeMetrics, "observe"),
    "the periodic log line": (tree_metrics.TreeLogging, "log"),
}
"""Every report of ours, and the function that makes it."""


def test_every_report_fails_and_the_engine_answers(monkeypatch, caplog):
    expected = plain_greedy()
    monkeypatch.setattr(reporting, "_failed", set())

    def fails(*args, **options):
        raise AttributeError("no such figure")

    for owner, name in BROKEN.values():
        monkeypatch.setattr(owner, name, fails)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    reporting.logger.addHandler(handler)
    try:
        with engine("binary:3", per_request_spec_decode_metrics="summary") as llm:
            found = token_ids(llm.generate(PROMPTS, greedy_params(), use_tqdm=False))
            llm.llm_engine.do_log_stats()
    finally:
        reporting.logger.removeHandler(handler)
    assert found == expected
    # once each, though most fail in every step
    assert sorted(messages) == sorted(
        f"spechub: {what} failed; the engine goes on without it" for what in BROKEN
    )


def test_what_is_no_failure_goes_on():
    with pytest.raises(KeyboardInterrupt), reporting.reporting("a report"):
        raise KeyboardInterrupt
