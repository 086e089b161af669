# SPDX-License-Identifier: Apache-2.0
"""The example that no other test runs: `examples/offline_batch.py`."""

import json
import runpy

from helpers.engines import settled_heap
from helpers.pair import PAIR, ROOT


def test_offline_batch(tmp_path, capsys):
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

    main = runpy.run_path(str(ROOT / "examples" / "offline_batch.py"))["main"]
    out = tmp_path / "answers.jsonl"
    with settled_heap():
        main(out, enforce_eager=True, max_num_seqs=8)
        destroy_model_parallel()
        destroy_distributed_environment()
    prompts = (PAIR / "prompts.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["prompt"] for record in records] == [
        json.loads(line)["turns"][0] for line in prompts
    ]
    assert all(record["answer"] for record in records)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"{len(prompts)} answers in {out}, ")
    assert 2 < float(said.split(", ")[1].split()[0]) < 6
