#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Serve the OpenAI API from many machines: Ray Serve runs one spechub engine per replica.

    python scripts/ray_serve.py --model TARGET --draft DRAFT --replicas 4

The script runs until it is interrupted. Send requests to http://HOST:PORT/v1, with the model's name
from --name.
"""

import json
from typing import Annotated, Any

import typer
from ray_platform import placement


def app(model: str, name: str, replicas: int, engine: dict[str, Any]):
    """The Ray Serve application: a router that passes requests on to the engines."""
    from ray.serve.llm import LLMConfig, build_openai_app

    config = LLMConfig(
        model_loading_config={"model_id": name, "model_source": model},
        engine_kwargs=engine,
        deployment_config={"num_replicas": replicas},
        **placement(),
    )
    return build_openai_app({"llm_configs": [config]})


def main(
    model: Annotated[str, typer.Option(help="The target model.")],
    draft: Annotated[str, typer.Option(help="The draft model.")],
    tree: Annotated[
        str, typer.Option(help="The draft tree, as in --speculative-config.")
    ] = "binary:3",
    replicas: Annotated[int, typer.Option(min=1, help="The number of engines.")] = 1,
    name: Annotated[str, typer.Option(help="The model's name in requests.")] = "spechub",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.")] = 8000,
    engine: Annotated[
        dict, typer.Option(parser=json.loads, metavar="JSON", help="Further engine options.")
    ] = "{}",
) -> None:
    """Serve OpenAI's interface with Ray Serve and one spechub engine per replica."""
    from ray import serve

    serve.start(http_options={"host": host, "port": port})
    engine["speculative_config"] = {"method": "spechub", "model": draft, "tree": tree}
    serve.run(app(model, name, replicas, engine), blocking=True)


if __name__ == "__main__":
    typer.run(main)
