"""``mara-rl prompts``: fill the queues that training reads from, and look at them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mara_rl.cli.options import SingleNode
from mara_rl.common.errors import ConfigError

if TYPE_CHECKING:
    from services.prompt_queue.prompt_queue import PromptQueue, QueueStatus

app = typer.Typer(no_args_is_help=True, help="Push prompts into a queue, see what became of them.")

_Queue = Annotated[str, typer.Option("--queue", help="Name of the queue.")]


@app.command()
def push(
    file: Annotated[Path, typer.Argument(help="Prompts: .jsonl, .json or .parquet.")],
    queue: _Queue = "default",
    repeats: Annotated[int, typer.Option(min=1, help="Answers an epoch for each prompt.")] = 1,
    single_node: SingleNode = False,
) -> None:
    """Add the prompts of FILE to a queue; those already there are left as they are."""
    from mara_rl.prompts.prompt_files import read_prompts

    prompts = read_prompts(file)
    with _open_queue(queue, single_node, create=True) as target:
        new = target.push(prompts, repeats=repeats)
        status = target.status()
    print(
        f"queue {queue}: {new} new prompts, {len(prompts) - new} already there, "
        f"{status.prompts} in all"
    )


@app.command()
def status(queue: _Queue = "default", single_node: SingleNode = False) -> None:
    """Show how many prompts wait, are being answered, were delivered, are dead."""
    with _open_queue(queue, single_node) as target:
        figures = target.status()
        dead = target.dead_letters()
    rows = queue_rows(figures)
    rows += [(f"dead: {letter['prompt']}", letter["reason"]) for letter in dead]
    console = Console()
    if not console.is_terminal:
        for name, value in rows:
            print(f"{name}\t{value}")
        return
    table = Table("", "", show_header=False, title=f"queue {queue}")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table, markup=False)


@app.command()
def requeue(queue: _Queue = "default", single_node: SingleNode = False) -> None:
    """Put the dead letters of a queue back into it."""
    with _open_queue(queue, single_node) as target:
        count = target.requeue_dead()
    print(f"queue {queue}: {count} prompts put back")


@contextlib.contextmanager
def _open_queue(name: str, single_node: bool, *, create: bool = False) -> Iterator["PromptQueue"]:
    from mara_rl.common.urls import hide_credentials
    from services.cluster.redis_server import connect, redis_errors, redis_url
    from services.prompt_queue.prompt_queue import PromptQueue

    # Ray sets RAY_ADDRESS inside jobs: a Redis of one node would be lost on the cluster.
    in_cluster = "RAY_ADDRESS" in os.environ
    if in_cluster and not single_node and not os.environ.get("MARA_REDIS_URL"):
        raise ConfigError(
            "MARA_REDIS_URL is not set, but RAY_ADDRESS is: expected a Redis that the whole "
            "cluster reaches (--single-node: use one of this machine alone)"
        )
    with redis_url(allow_embedded=True) as url, redis_errors(url), connect(url) as client:
        queue = PromptQueue(client, name, create=create)
        if not create and not PromptQueue.exists(client, name):
            raise ConfigError(
                f"queue {name!r}: no such queue in {hide_credentials(url)}; expected one that "
                "`mara-rl prompts push` or a run has made, not more than a week ago in the case of "
                "a finished run"
            )
        yield queue


def queue_rows(figures: "QueueStatus") -> list[tuple[str, str]]:
    rows = [
        ("prompts", str(figures.prompts)),
        ("epoch", "none yet" if figures.epoch < 0 else str(figures.epoch)),
        ("waiting", str(figures.waiting)),
        ("pending", str(sum(reader.pending for reader in figures.pending.values()))),
        ("delivered, not in a checkpoint yet", str(figures.delivered)),
        ("dead letters", str(figures.dead)),
        ("duplicates", str(figures.duplicates)),
    ]
    rows += [
        (f"reader {name}", f"{reader.pending} pending, silent for {reader.silent_s:.0f} s")
        for name, reader in figures.pending.items()
    ]
    return rows
