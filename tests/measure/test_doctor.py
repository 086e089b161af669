# SPDX-License-Identifier: Apache-2.0
"""The doctor: what it says of a sound machine, and that it finds what is broken."""

import pytest
import torch
from typer.testing import CliRunner

from vllm_spechub import cli
from vllm_spechub.measure.doctor import examination, kernels, machine
from vllm_spechub.measure.doctor.engines import check_engines
from vllm_spechub.measure.doctor.finding import FAULT, OK, WARNING, Finding
from vllm_spechub.measure.doctor.machine import check_machine
from vllm_spechub.triton_kernels import step_inputs

CPU = torch.device("cpu")


@pytest.mark.parametrize("broken", [None, "sample_children", "verify_tree"])
def test_kernels_are_compared_with_their_references(monkeypatch, broken):
    ours, references = kernels._kernels()
    assert ours.verify_tree is not references.verify_tree
    if broken is not None:
        original = getattr(ours, broken)

        def wrong(*arguments, **options):
            found = original(*arguments, **options)
            found.tokens[::5, 0] ^= 1
            return found

        monkeypatch.setattr(
            kernels, "_kernels", lambda: (ours._replace(**{broken: wrong}), references)
        )
    found = [*kernels._trees("mixed", torch.float32, CPU, True)]
    outcomes = {
        finding.what.partition(",")[0].replace(" ", "_"): finding.outcome for finding in found
    }
    assert outcomes == {
        "child_sampling": FAULT if broken == "sample_children" else OK,
        "verification": FAULT if broken == "verify_tree" else OK,
    }
    assert all(finding.remedy for finding in found if finding.outcome == FAULT)


def test_tokens_outside_the_vocabulary_are_a_fault():
    none_wrong = torch.zeros(3, dtype=torch.bool)
    assert kernels._compared("verification", none_wrong).outcome == OK
    assert kernels._compared("verification", none_wrong, inside=False).outcome == FAULT


def test_inputs(monkeypatch):
    assert kernels._inputs(CPU).outcome == OK

    def wrong(inputs, *arguments):
        step_inputs.prepare_drafts_reference(inputs, *arguments)
        inputs.root_positions[0] += 1

    monkeypatch.setattr(step_inputs, "prepare_drafts", wrong)
    assert kernels._inputs(CPU).outcome == FAULT


def test_attention_and_compaction():
    assert kernels._attention(torch.float32, CPU).outcome == OK
    assert kernels._compaction(torch.float32, CPU).outcome == OK


def test_kernels_that_stop_are_a_fault(monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAM", "no_such_module")
    (finding,) = kernels.check_kernels(full=False)
    assert finding.outcome == FAULT
    assert "No module named no_such_module" in finding.found


def test_a_tiny_pair_in_engines(tmp_path):
    found = [*check_engines(tmp_path)]
    assert [finding.outcome for finding in found] == [OK] * 3, found
    assert found[1].found == "6 of 6 greedy texts equal plain vLLM's"


@pytest.mark.parametrize(
    ("plugins", "outcome"), [(None, OK), ("spechub,other", OK), ("other", FAULT)]
)
def test_machine(monkeypatch, plugins, outcome):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    found = {finding.what: finding for finding in check_machine()}
    assert found["vLLM"].outcome == OK
    assert found["plugin"].outcome == outcome


def test_a_vllm_between_supported_versions_is_a_fault(monkeypatch):
    monkeypatch.setattr(machine, "version", lambda package: "0.32.1+cpu")
    found = next(iter(check_machine()))
    assert (found.outcome, found.found) == (FAULT, "vllm 0.32.1+cpu")
    assert found.remedy == "supported are 0.32.0 and 0.33.0; install one"


@pytest.mark.parametrize(("last", "status"), [(WARNING, 0), (FAULT, 1)])
def test_the_exit_status_tells_of_faults(monkeypatch, last, status):
    monkeypatch.setattr(
        examination,
        "examine",
        lambda full: iter([Finding("a", OK, "sound"), Finding("b", last, "[odd]", "mend it")]),
    )
    done = CliRunner().invoke(cli.app, ["doctor"])
    assert done.exit_code == status
    assert "ok  a: sound" in done.output
    assert "b: [odd]" in done.output
    assert "mend it" in done.output
