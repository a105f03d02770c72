"""Entry point of ``mara-rl``: gathers the commands and turns errors into exit statuses."""

import sys
from importlib import metadata
from typing import Annotated

import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mara_rl import __version__
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


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mara-rl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line.

    Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 training ended by SIGTERM.
    """
    try:
        app()
    except (MaraError, OSError) as error:  # OSError: a full disk, a folder not to be written, …
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if not _comes_with_an_extra(error.name or ""):
            raise
        print(f"error: {error.name} is not installed: pip install 'mara-rl[all]'", file=sys.stderr)
        sys.exit(1)


def _comes_with_an_extra(module: str) -> bool:
    package = canonicalize_name(module.partition(".")[0])
    requirements = [Requirement(text) for text in metadata.requires("mara-rl") or []]
    return any(canonicalize_name(r.name) == package for r in requirements if r.marker)
