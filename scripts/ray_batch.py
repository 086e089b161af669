#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Answer a file of prompts on many machines: Ray Data runs one spechub engine per replica.

    python scripts/ray_batch.py prompts.jsonl answers --model TARGET --draft DRAFT --replicas 8 \\
        --id-column question_id --prompt-column turns

The script reads a JSONL or Parquet file, and writes each row's id and answer into the folder. Ray
keeps a checkpoint of the rows that are written: after a failure, the same command continues without
losing or repeating a row. If all rows are answered, it does nothing.
"""

import json
import zlib
from pathlib import Path
from typing import Annotated, Any

import typer
from ray_platform import placement

SPARE_CPUS = 4


def processor_config(model: str, engine: dict[str, Any], replicas: int, batch_size: int):
    """The configuration of one engine per replica."""
    from ray.data.llm import vLLMEngineProcessorConfig

    return vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs=engine,
        concurrency=(replicas, replicas),
        batch_size=batch_size,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        **placement(),
    )


def read(source: Path, id_column: str, prompt_column: str):
    """The rows as a Ray dataset. Raises ValueError naming a column that is missing."""
    import ray

    read_rows = ray.data.read_parquet if source.suffix == ".parquet" else ray.data.read_json
    rows = read_rows(str(source))
    columns = rows.schema().names
    for option, column in (("--id-column", id_column), ("--prompt-column", prompt_column)):
        if column not in columns:
            raise ValueError(f"{option} is {column!r}, {source} has: {', '.join(columns)}")
    return rows


def main(
    source: Annotated[
        Path, typer.Argument(help="The prompts: a JSONL or Parquet file.", exists=True)
    ],
    out: Annotated[Path, typer.Argument(help="The folder for answers and the checkpoint.")],
    model: Annotated[str, typer.Option(help="The target model.")],
    draft: Annotated[str, typer.Option(help="The draft model.")],
    tree: Annotated[
        str, typer.Option(help="The draft tree, as in --speculative-config.")
    ] = "binary:3",
    replicas: Annotated[int, typer.Option(min=1, help="The number of engines.")] = 2,
    id_column: Annotated[str, typer.Option(help="The column with a unique id of each row.")] = "id",
    prompt_column: Annotated[
        str,
        typer.Option(
            help="The column with a text, or with a list of turns, of which the first is used."
        ),
    ] = "prompt",
    temperature: Annotated[float, typer.Option(min=0.0, help="The sampling temperature.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 256,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows that a replica processes at once.")
    ] = 64,
    engine: Annotated[
        dict, typer.Option(parser=json.loads, metavar="JSON", help="Further engine options.")
    ] = "{}",
) -> None:
    """Answer a file of prompts with Ray Data and one spechub engine per replica."""
    import ray
    from ray.data.checkpoint import CheckpointConfig
    from ray.data.llm import build_processor

    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column=id_column,
        checkpoint_path=str((out / "checkpoint").absolute()),
        delete_checkpoint_on_success=False,
    )
    ray.init(ignore_reinit_error=True)
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if cpus < replicas + SPARE_CPUS:
        # Ray Data would wait for more CPUs without any message.
        raise typer.BadParameter(
            f"--replicas {replicas} needs {replicas + SPARE_CPUS} CPUs (reading, checkpoint and "
            f"writing take {SPARE_CPUS}), but the cluster has {cpus}"
        )
    try:
        rows = read(source, id_column, prompt_column)
        engine["speculative_config"] = {"method": "spechub", "model": draft, "tree": tree}
        config = processor_config(model, engine, replicas, batch_size)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        prompt = row[prompt_column]
        return {
            "prompt": prompt if isinstance(prompt, str) else prompt[0],
            "sampling_params": {
                "temperature": temperature,
                "max_tokens": max_tokens,
                # a row gets the same answer on every replica, and after a failure
                "seed": zlib.crc32(str(row[id_column]).encode()),
            },
        }

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        return {
            id_column: row[id_column],
            "text": row["generated_text"],
            "num_tokens": row["num_generated_tokens"],
        }

    answers = build_processor(config, preprocess=ask, postprocess=answer)(rows)
    folder = str((out / "answers").absolute())
    if source.suffix == ".parquet":
        answers.write_parquet(folder, mode="append")
    else:
        answers.write_json(folder, mode="append")


if __name__ == "__main__":
    typer.run(main)
