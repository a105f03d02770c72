"""Entry point of ``mara-rl``: gathers the commands and turns errors into exit statuses."""

import sys

import typer

from mara_rl.cli import agents, doctor, evaluate, generate, prompts, rewards, serve, status, train
from mara_rl.common.errors import MaraError

app = typer.Typer(
    name="mara-rl",
    help="Token-level accept/reject alignment of frozen LLMs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train.train)
app.command()(evaluate.evaluate)
app.command()(generate.generate)
app.command()(serve.serve)
app.command()(status.status)
app.command()(doctor.doctor)
app.add_typer(agents.app, name="agents")
app.add_typer(prompts.app, name="prompts")
app.add_typer(rewards.app, name="rewards")


def main() -> None:
    """Run the command line.

    Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 training ended by SIGTERM.
    """
    try:
        app()
    except (MaraError, OSError) as error:  # OSError: a full disk, a folder not to be written, …
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
