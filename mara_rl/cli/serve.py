"""``mara-rl serve``: the aligned-generation endpoint and its page, on this machine."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from mara_rl.cli.options import AllowOtherLLM, DTypeName


def serve(
    agents: Annotated[
        list[str] | None,
        typer.Option(
            "--agent",
            help="models:/name@alias, runs:/…, a folder, a .pth or a hub id, or name=REF; "
            "repeatable. Champion and candidate of the registry are there anyway.",
        ),
    ] = None,
    llm: Annotated[
        str | None, typer.Option(help="Shipped name, hub id, folder or .gguf file.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than loopback need API keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    slots: Annotated[int, typer.Option(help="Answers decoded at the same time.")] = 16,
    scores: Annotated[
        list[str] | None,
        typer.Option(
            "--score",
            help="A score model to run as well, as NAME=MODEL, e.g. reward=smollm2-reward, or "
            "NAME=URL of a score service that runs. Repeatable.",
        ),
    ] = None,
    replicas: Annotated[int, typer.Option(help="Replicas, an LLM each.")] = 1,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of a replica; unless given all but one.")
    ] = None,
    gpus: Annotated[float, typer.Option(help="GPUs of a replica; 0 runs on the CPU.")] = 0.0,
    dtype: DTypeName = None,
    keys_file: Annotated[
        Path | None, typer.Option(help="API keys, one a line, beside those of MARA_API_KEY.")
    ] = None,
    log_text: Annotated[
        bool, typer.Option("--log-text", help="Write prompts and answers to the request log.")
    ] = False,
    allow_other_llm: AllowOtherLLM = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any other setting: a.b=value, e.g. limits.max_concurrent=4. Repeatable."
        ),
    ] = None,
) -> None:
    """Serve aligned answers in OpenAI's shape, and a page to see them, until Ctrl-C."""
    from mara_rl.common.home import mara_home
    from mara_rl.common.urls import is_http_url
    from mara_rl.common.yaml_settings import override
    from mara_rl.llm.policy_llm import SMOLLM2
    from services.endpoint.endpoint_config import EndpointConfig
    from services.endpoint.local_server import serve_locally

    models = _models(scores or [])
    settings: dict[str, Any] = {}
    override(settings, overrides or [])
    log_file = mara_home() / "logs" / f"endpoint-{port}.jsonl"
    config = EndpointConfig.parse(
        {
            "llm": llm or SMOLLM2,
            "agents": agents or (),
            "slots": slots,
            "num_replicas": replicas,
            "torch_threads": max(1, (os.cpu_count() or 1) - 1) if threads is None else threads,
            "num_gpus": gpus,
            "dtype": dtype,
            "keys_file": keys_file.resolve() if keys_file else None,
            "log_text": log_text,
            "log_file": log_file,
            "allow_other_llm": allow_other_llm,
            "score_apps": {name: at if is_http_url(at) else name for name, at in models.items()},
            **settings,
        }
    )
    started = {name: model for name, model in models.items() if not is_http_url(model)}
    serve_locally(config, started, host=host, port=port, announce=print)


def _models(scores: list[str]) -> dict[str, str]:
    """Score models by their names."""
    models: dict[str, str] = {}
    for given in scores:
        name, _, model = given.partition("=")
        if not name.isidentifier() or not model:
            raise typer.BadParameter(
                f"--score {given!r}: expected NAME=MODEL, e.g. cost=smollm2-cost"
            )
        if name in models:
            raise typer.BadParameter(f"--score {given!r}: {name} is {models[name]!r} already")
        models[name] = model
    return models
