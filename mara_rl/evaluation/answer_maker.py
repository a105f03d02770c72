"""Who makes answers: LLMs in this process, or the rollout actors of a training run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from mara_rl.agents.agent import Agent
from mara_rl.evaluation.answers import Answer
from mara_rl.evaluation.plan import GeneratedMethod
from mara_rl.llm.policy_llm import DType


@dataclass(frozen=True)
class AnswerRequest:
    """One answer to be made.

    Attributes:
        id, replicate: which prompt, and the how manieth answer to it.
        text: what the LLM is given as the user's turn.
        seed: of what is drawn for it, whatever else is decoded and in which order.
    """

    id: str
    replicate: int
    text: str
    seed: int


class AnswerMaker(Protocol):
    """Makes the answers of a plan's methods.

    Attributes:
        device, dtype: where and in which numbers: "cpu", "float32".
    """

    device: str
    dtype: DType

    def prepare(self, method: GeneratedMethod) -> None:
        """Load what the method needs. Raises ConfigError where that is not there."""
        ...

    def make(
        self,
        method: GeneratedMethod,
        agent: Agent | None,
        requests: Sequence[AnswerRequest],
        progress: Callable[[int], None],
    ) -> Iterator[list[Answer]]:
        """The answers asked for, as they are complete; of the method prepared last.

        ``progress`` hears how many more are. Raises MaraError where that cannot be done.
        """
        ...

    def release(self) -> None:
        """Give memory back: nothing is asked for until all answers are judged."""
        ...
