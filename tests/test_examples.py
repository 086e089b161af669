# SPDX-License-Identifier: Apache-2.0
"""The examples that no other test runs."""

import json
import runpy

import pytest

from helpers.engines import engine, greedy_params, settled_heap
from helpers.pair import EXIT_TARGET, PAIR, ROOT, TARGET


@pytest.fixture
def run():
    """Runs an example's `main` with an engine inside the test's process."""
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

    def main(name, *arguments):
        example = runpy.run_path(str(ROOT / "examples" / name))
        with settled_heap():
            example["main"](*arguments, enforce_eager=True, max_num_seqs=8)
            destroy_model_parallel()
            destroy_distributed_environment()
        return example

    return main


def tokens_per_tree(line: str) -> float:
    return float(line.removesuffix(" tokens per verified tree").split()[-1])


def test_offline_batch(run, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    run("offline_batch.py", out)
    prompts = (PAIR / "prompts.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["prompt"] for record in records] == [
        json.loads(line)["turns"][0] for line in prompts
    ]
    assert all(record["answer"] for record in records)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"{len(prompts)} answers in {out}, ")
    assert 2 < tokens_per_tree(said) < 6


@pytest.mark.parametrize(
    ("name", "target"), [("eagle_head.py", TARGET), ("early_exit.py", EXIT_TARGET)]
)
def test_drafts_of_other_kinds(run, capsys, name, target):
    prompts = run(name)["PROMPTS"]
    said = capsys.readouterr().out
    assert 2 < tokens_per_tree(said.splitlines()[-1]) < 6
    with engine(model=target) as llm:
        for request in llm.generate(prompts, greedy_params(64), use_tqdm=False):
            assert request.prompt + request.outputs[0].text in said
