"""Options that several commands have."""

from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting: a.b=value. Repeatable.")
]
AgentsLLM = Annotated[
    str | None, typer.Option(help="The LLM; unless given the one the agent was trained on.")
]
DTypeName = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; fits the device.")
]
AllowOtherLLM = Annotated[
    bool, typer.Option("--allow-other-llm", help="Use agents of another LLM of this size.")
]
SingleNode = Annotated[
    bool,
    typer.Option(
        "--single-node", help="Use this machine's own Redis and MLflow even in a cluster."
    ),
]
