"""What the endpoint needs from a registry of agents: names that stand for agents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mara_rl.agents.agent import Agent


@dataclass(frozen=True, slots=True, eq=False)
class ServedAgent:
    """An agent that can answer, on the LLM's device.

    Attributes:
        version: what it is, whatever name it was asked for by, e.g. ``mara-smollm2/3``.
        created: seconds since 1970.
    """

    version: str
    agent: Agent
    created: int


class AgentCatalog(Protocol):
    """Agents by the names that requests use; callable from several threads."""

    def names(self) -> Sequence[tuple[str, ServedAgent]]:
        """Names to choose from, with what each stands for at this moment."""
        ...

    def loaded(self, name: str) -> ServedAgent | None:
        """What a name stands for, if that is known and loaded; does not block."""
        ...

    def load(self, name: str) -> ServedAgent:
        """As `loaded`, but looks where agents come from; may block.

        Raises DataError where there is no such agent or it does not fit the LLM, RetryableError
        when the registry is away.
        """
        ...

    def close(self) -> None:
        """Stop following changes."""
        ...
