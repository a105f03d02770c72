"""Answers for the comparison at a run's end, by the LLMs of its rollout actors."""

import time
from collections.abc import Callable, Iterator, Sequence

from mara_rl.agents.agent import Agent
from mara_rl.evaluation.answer_maker import AnswerRequest
from mara_rl.evaluation.answers import Answer
from mara_rl.evaluation.plan import AgentMethod, GeneratedMethod
from mara_rl.llm.policy_llm import placement
from mara_rl.training.config import TrainConfig
from mara_rl.training.rllib.rollout_group import RolloutGroup, derived_seed


class RolloutAnswers:
    """The `AnswerMaker` of a training run: of its LLM alone, greedy, and of agents on it.

    What it draws depends on the run's seed and a request's place.
    """

    def __init__(
        self, config: TrainConfig, runners: RolloutGroup, check_interrupt: Callable[[], None]
    ) -> None:
        device, self.dtype = placement(
            "cuda" if config.rollouts.num_gpus else "cpu", config.llm.dtype
        )
        self.device = device.type
        self._seed = derived_seed(config.seed, 2)
        self._runners = runners
        self._check_interrupt = check_interrupt

    def prepare(self, method: GeneratedMethod) -> None:
        """The actors have it all."""

    def make(
        self,
        method: GeneratedMethod,
        agent: Agent | None,
        requests: Sequence[AnswerRequest],
        progress: Callable[[int], None],
    ) -> Iterator[list[Answer]]:
        """See `AnswerMaker`; all at once, each with an equal share of what decoding took."""

        def advance(done: int) -> None:
            progress(done)
            self._check_interrupt()

        began_s, forwards = time.monotonic(), self._runners.token_forwards
        decoded = self._runners.answers(
            [request.text for request in requests],
            agent=agent,
            rule=method.rule if isinstance(method, AgentMethod) else None,
            seed=self._seed,
            progress=advance,
        )
        share = 1 / len(decoded)
        yield [
            Answer.of(
                request.id,
                request.replicate,
                answer,
                forwards=(self._runners.token_forwards - forwards) * share,
                seconds=(time.monotonic() - began_s) * share,
            )
            for request, answer in zip(requests, decoded, strict=True)
        ]

    def release(self) -> None:
        """Nothing is held in this process."""
