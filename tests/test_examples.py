# SPDX-License-Identifier: Apache-2.0
"""The examples that no other test runs."""

import json
import runpy
from shutil import copy

import pytest
from model_families import FAMILIES

from helpers import models, multimodal
from helpers.engines import engine, greedy_params, settled_heap
from helpers.pair import DRAFT, EXIT_TARGET, PAIR, ROOT, TARGET


@pytest.fixture
def run():
    """Runs an example's `main` with an engine inside the test's process."""
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

    def main(name, *arguments, **engine):
        example = runpy.run_path(str(ROOT / "examples" / name))
        with settled_heap():
            example["main"](*arguments, enforce_eager=True, max_num_seqs=8, **engine)
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


def test_contrastive_decoding(run, capsys):
    asked = run("contrastive_decoding.py")["ASKED"]
    said = capsys.readouterr().out
    answers = [said.partition(f"# {name}\n")[2].partition("\n\n# ")[0] for name in asked]
    assert len(set(answers)) == len(asked)
    assert 1.5 < tokens_per_tree(said.splitlines()[-1]) < 6


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("eagle_head.py", TARGET),
        ("early_exit.py", EXIT_TARGET),
        ("nested_draft.py", EXIT_TARGET),
    ],
)
def test_drafts_of_other_kinds(run, capsys, name, target):
    prompts = run(name)["PROMPTS"]
    said = capsys.readouterr().out
    assert 2 < tokens_per_tree(said.splitlines()[-1]) < 6
    with engine(model=target) as llm:
        for request in llm.generate(prompts, greedy_params(64), use_tqdm=False):
            assert request.prompt + request.outputs[0].text in said


def test_multimodal(run, tmp_path, capsys):
    with multimodal.importable():
        target = multimodal.target("llava", tmp_path)
        picture = str(tmp_path / "picture.png")
        multimodal.image(0).save(picture)
        run(
            "multimodal.py",
            picture,
            target.folder,
            DRAFT,
            dtype="float32",
            max_model_len=256,
            kv_cache_memory_bytes=64 << 20,
        )
    said = capsys.readouterr().out
    assert said.startswith("What is in this picture?")
    assert 1.3 < tokens_per_tree(said.splitlines()[-1]) < 6


def test_experts(run, tmp_path, capsys):
    (family,) = (family for family in FAMILIES if family.name == "Qwen 3 MoE")
    target, draft = models.pair(family, tmp_path)
    for folder in (target, draft):
        for file in PAIR.glob("target/tokenizer*"):
            copy(file, folder)
    small = {"dtype": "float32", "max_model_len": 256, "kv_cache_memory_bytes": 64 << 20}
    prompts = run("experts.py", target, draft, **small)["PROMPTS"]
    said = capsys.readouterr().out
    trees = [int(line.split()[0]) for line in said.splitlines() if line.endswith(" at a time")]
    assert trees[0] == 0 < 4 < trees[1]
    with engine(model=target) as llm:
        for request in llm.generate(prompts, greedy_params(32, ignore_eos=True), use_tqdm=False):
            assert request.prompt + request.outputs[0].text in said
