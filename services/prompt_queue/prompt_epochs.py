"""The order of an epoch's entries, and a queue's position in it; pure functions of the prompts."""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field


class Ticket(NamedTuple):
    """What an entry stands for: this prompt, in this epoch, for the ``sample``-th time."""

    epoch: int
    prompt_id: str
    sample: int
    failures: int = 0


class QueuePosition(BaseModel):
    """What is unfinished in a queue: enough to build its stream again from the prompts alone.

    In stream order: ``head``, then all of ``epoch`` from rank ``frontier`` on, then ``tail``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epoch: int = Field(description="the newest epoch in the stream; -1 before the first")
    seed: int = Field(description="what orders the epochs")
    prompts: int = Field(ge=0, description="number of prompts in the catalogue")
    head: list[Ticket] = Field(description="read and not delivered, or out of order")
    frontier: str | None = Field(description="rank of the first unread entry; None: all are read")
    tail: list[Ticket] = Field(description="queued again behind the epoch")
    withdrawn: list[str] = Field([], description="prompts that are dead letters, sorted")
    duplicates: int = Field(0, ge=0, description="counted by then")


def rank(ticket: Ticket, seed: int) -> str:
    """An entry's place in its epoch: entries are ordered by rank, 16 hex digits.

    It hangs on seed, epoch, prompt and sample alone, so that prompts that come or go leave the
    order of the others as it was.
    """
    name = f"{seed} {ticket.epoch} {ticket.sample} {ticket.prompt_id}"
    return hashlib.blake2b(name.encode(), digest_size=8).hexdigest()


def epoch_order(
    repeats: Mapping[str, int], *, seed: int, epoch: int, frontier: str = ""
) -> list[Ticket]:
    """An epoch's entries, in order: each prompt as often as ``repeats`` says.

    With a ``frontier``, only those from that rank on.
    """
    tickets = (
        Ticket(epoch, prompt_id, sample)
        for prompt_id, count in repeats.items()
        for sample in range(count)
    )
    ranked = sorted((rank(ticket, seed), ticket) for ticket in tickets)
    return [ticket for place, ticket in ranked if place >= frontier]
