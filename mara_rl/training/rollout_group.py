"""What the driver asks of the rollout actors beside PPO's sampling: answers, and barriers."""

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mara_rl.agent import Agent, AgentSpec
from mara_rl.decoding import DecodedAnswer, Decoder
from mara_rl.errors import MaraError, RetryableError
from mara_rl.training.config import TrainConfig


class RolloutGroup:
    """The rollout actors of an algorithm."""

    def __init__(self, algorithm: Any, config: TrainConfig) -> None:
        self._group = algorithm.env_runner_group
        self._config = config

    def barrier(self, iteration: int) -> None:
        """Abandon open episodes and re-derive every generator from (seed, iteration, runner).

        After this a run that continues and one that resumes here do the same.
        """
        seed_everything(derived_seed(self._config.seed, iteration, 0))
        self._group.foreach_env_runner(
            functools.partial(_restart, seed=self._config.seed, iteration=iteration),
            local_env_runner=False,
        )

    def answers(
        self,
        prompts: Sequence[str],
        *,
        agent: Agent | None = None,
        rule: str | None = None,
        keep_states: bool = False,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> list[DecodedAnswer]:
        """Answers to ``prompts``, in order, decoded by the actors' LLMs in rounds.

        Raises RetryableError when no actor is left, and whatever decoding itself raised.
        """
        rollouts = self._config.rollouts
        work = functools.partial(
            _decode,
            num_slots=rollouts.num_slots,
            max_new_tokens=rollouts.max_new_tokens,
            top_k=self._config.candidates.top_k,
            top_p=self._config.candidates.top_p,
            system=self._config.llm.system,
            spec=agent.spec if agent else None,
            weights=agent.state_dict() if agent else None,
            rule=rule,
            keep_states=keep_states,
        )
        done: list[DecodedAnswer] = []
        while len(done) < len(prompts):
            runners = self._group.healthy_env_runner_ids()
            if not runners:
                raise RetryableError("no rollout actor is alive")
            size = rollouts.num_slots
            start = len(done)
            chunks = [
                prompts[start + i * size : start + (i + 1) * size] for i in range(len(runners))
            ]
            calls = [
                functools.partial(work, prompts=list(chunk), seed=derived_seed(seed, start, i))
                for i, chunk in enumerate(chunks)
            ]
            results = self._group.foreach_env_runner(
                calls,
                local_env_runner=False,
                remote_worker_ids=runners,
                timeout_seconds=rollouts.sample_timeout_s,
            )
            for chunk, result in zip(chunks, results, strict=False):
                if isinstance(result, MaraError):
                    raise result
                if len(result) != len(chunk):
                    break
                done.extend(result)
                if progress is not None:
                    progress(len(result))
        return done

    def last_failures(self) -> list[str]:
        """Why episodes failed lately, one line from every actor that saw a failure."""
        failures = self._group.foreach_env_runner(
            lambda runner: runner.env.unwrapped.task.last_failure,
            local_env_runner=False,
            timeout_seconds=10.0,
        )
        return sorted({failure for failure in failures if failure})


def derived_seed(*parts: int) -> int:
    """A 32-bit seed that depends on all parts."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Seed the global generators RLlib draws from in this process."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _restart(runner: Any, seed: int, iteration: int) -> None:
    runner._seed = derived_seed(seed, iteration, runner.worker_index)
    runner._needs_initial_reset = True
    seed_everything(runner._seed)


def _decode(
    runner: Any,
    *,
    prompts: list[str],
    num_slots: int,
    max_new_tokens: int,
    top_k: int,
    top_p: float,
    system: str | None,
    spec: AgentSpec | None,
    weights: dict[str, Tensor] | None,
    rule: Any,
    keep_states: bool,
    seed: int,
) -> list[DecodedAnswer] | MaraError:
    """Runs in the actor. An exception would end the actor, so a known one is returned."""
    if not prompts:
        return []
    llm = runner.env.unwrapped.task.llm
    agent = None
    if spec is not None and weights is not None:
        agent = Agent(spec)
        agent.load_state_dict(weights)
        agent.to(llm.device)
    decoder = Decoder(
        llm,
        min(num_slots, len(prompts)),
        agent=agent,
        rule=rule,
        top_k=top_k,
        top_p=top_p,
        system=system,
        keep_states=keep_states,
    )
    try:
        return decoder.answers(prompts, max_new_tokens=max_new_tokens, seed=seed)
    except MaraError as error:
        return error
