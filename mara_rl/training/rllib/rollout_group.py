"""What the driver asks of the rollout actors beside PPO's sampling: answers, and new starts."""

import functools
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mara_rl.agents.agent import Agent, AgentSpec, Rule
from mara_rl.common.errors import MaraError, RetryableError
from mara_rl.decoding.answer import DecodedAnswer
from mara_rl.decoding.blend import Blend
from mara_rl.decoding.decoder import Decoder
from mara_rl.decoding.request import DecodeRequest, DecodeSettings
from mara_rl.training.config import TrainConfig
from mara_rl.training.faults.fault_report import Faults
from services.cluster.ray_internals import (
    drop_env_runners,
    kill_env_runner,
    reset_env_runner,
)

_MAX_ATTEMPTS = 3
_PING_TIMEOUT_S = 10.0
_RETRY_WAIT_S = 1.0


class RolloutGroup:
    """The rollout actors of an algorithm.

    Attributes:
        token_forwards: tokens that `answers` has put through the actors' LLMs so far.
    """

    def __init__(self, algorithm: Any, config: TrainConfig) -> None:
        self._algorithm = algorithm
        self._group = algorithm.env_runner_group
        self._config = config
        self.token_forwards = 0

    @property
    def num_alive(self) -> int:
        """Actors not known to be dead."""
        return self._group.num_healthy_remote_workers()

    @property
    def num_restarts(self) -> int:
        """How often actors died and came back so far."""
        return self._group.num_remote_worker_restarts() + self._algorithm.unnoticed_restarts

    @property
    def num_dropped_samples(self) -> int:
        """How often an actor brought no sample in time so far."""
        return self._group.num_env_runners_dropped_lifetime()

    def restart(self, iteration: int) -> None:
        """Abandon open episodes and seed every actor by (seed, iteration, its number)."""
        self._group.foreach_env_runner(
            functools.partial(_restart, seed=self._config.seed, iteration=iteration),
            local_env_runner=False,
            timeout_seconds=self._config.rollouts.sample_timeout_s,
        )

    def answers(
        self,
        prompts: Sequence[str],
        *,
        openings: Sequence[str] | None = None,
        agent: Agent | None = None,
        rule: Rule | None = None,
        keep_states: bool = False,
        exact: bool | None = None,
        keep_candidates: bool = False,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> list[DecodedAnswer]:
        """Answers to ``prompts``, in order, decoded by the actors' LLMs in rounds; see `Decoder`.

        The options are those of `DecodeSettings`.

        What an actor that dies or hangs was decoding is decoded again, by another one or by the
        same one restarted. Raises RetryableError when that fails three times or when there is no
        live actor for ``rollouts.sample_timeout_s``, and whatever decoding itself raised.
        """
        rollouts = self._config.rollouts
        work = functools.partial(
            _decode,
            num_slots=rollouts.num_slots,
            settings=DecodeSettings(
                max_new_tokens=rollouts.max_new_tokens,
                rule=rule,
                # An agent decodes with its own k and p.
                **({} if agent else self._config.candidates.model_dump()),
                keep_states=keep_states,
                exact=exact,
                keep_candidates=keep_candidates,
            ),
            system=self._config.llm.system,
            spec=agent.spec if agent else None,
            weights=agent.state_dict() if agent else None,
        )
        starts = range(0, len(prompts), rollouts.num_slots)
        chunks = {start: slice(start, start + rollouts.num_slots) for start in starts}
        done: dict[int, list[DecodedAnswer]] = {}
        attempts: Counter[int] = Counter()
        alive_s = time.monotonic()
        while len(done) < len(chunks):
            runners = self._group.healthy_env_runner_ids()
            if not runners:
                self._await_runner(alive_s)
                continue
            todo = [start for start in chunks if start not in done][: len(runners)]
            attempts.update(todo)
            results = self._group.foreach_env_runner(
                [
                    functools.partial(
                        work,
                        place=start,
                        prompts=list(prompts[chunks[start]]),
                        openings=list((openings or [""] * len(prompts))[chunks[start]]),
                        seed=derived_seed(seed, start),
                    )
                    for start in todo
                ],
                local_env_runner=False,
                remote_worker_ids=runners[: len(todo)],
                timeout_seconds=rollouts.sample_timeout_s,
            )
            alive_s = time.monotonic()
            # Actors that failed are missing from the results: each says which chunk it answers.
            for place, result, token_forwards in results:
                if isinstance(result, MaraError):
                    raise result
                done[place] = result
                self.token_forwards += token_forwards
                if progress is not None:
                    progress(len(result))
            failed = [start for start in todo if start not in done]
            for start in failed:
                if attempts[start] == _MAX_ATTEMPTS:
                    raise RetryableError(
                        f"no answers to prompts {start + 1} to {start + rollouts.num_slots}: "
                        f"{_MAX_ATTEMPTS} times their rollout actor died or took more than "
                        f"{rollouts.sample_timeout_s:g} s (rollouts.sample_timeout_s)"
                    )
            if failed:
                self._revive()
        return [answer for start in starts for answer in done[start]]

    def fits_context(self, prompts: Sequence[str]) -> list[bool]:
        """Whether each prompt leaves room for an answer in the LLM's context."""
        measure = functools.partial(
            _fits_context,
            prompts=list(prompts),
            system=self._config.llm.system,
            max_new_tokens=self._config.rollouts.max_new_tokens,
        )
        alive_s = time.monotonic()
        while True:
            fitting = self._group.foreach_env_runner(
                measure,
                local_env_runner=False,
                remote_worker_ids=self._group.healthy_env_runner_ids()[:1],
                timeout_seconds=self._config.rollouts.sample_timeout_s,
            )
            if fitting:
                return fitting[0]
            self._await_runner(alive_s)

    def replace_silent(self) -> list[int]:
        """Kill the actors that answer nothing, which Ray then starts anew; their numbers.

        For actors that had their time: RLlib waits for one that hangs again and again.
        """
        answering = self._group.foreach_env_runner(
            lambda runner: runner.worker_index,
            local_env_runner=False,
            timeout_seconds=_PING_TIMEOUT_S,
        )
        # Those found dead by that call are not among the healthy ones any more.
        silent = [i for i in self._group.healthy_env_runner_ids() if i not in answering]
        for number in silent:
            kill_env_runner(self._group, number)
        return silent

    def stop(self) -> None:
        """End the actors; what they hold of the prompt queue is given back by those that answer.

        To be called before the algorithm's own `stop`, which waits without limit for actors that
        hang or are starting again.
        """
        self._group.foreach_env_runner(
            lambda runner: runner.stop(),
            local_env_runner=False,
            timeout_seconds=_PING_TIMEOUT_S,
        )
        drop_env_runners(self._group)

    def _revive(self) -> list[int]:
        """Bring back the actors that died or hang, as far as they are up again; their numbers."""
        self.replace_silent()
        return self._algorithm.restore_env_runners(self._group)

    def _await_runner(self, alive_s: float) -> None:
        """Look whether an actor is back; the last one was alive at ``alive_s``."""
        if not self._revive():
            patience_s = self._config.rollouts.sample_timeout_s
            if time.monotonic() - alive_s > patience_s:
                raise RetryableError(
                    f"no live rollout actor for {patience_s:g} s (rollouts.sample_timeout_s)"
                )
            time.sleep(_RETRY_WAIT_S)

    def take_faults(self) -> Faults:
        """What went wrong since the last call; to be asked for when no actor is at work.

        RLlib's metrics leave out iterations without samples, which is where most of it is. What an
        actor had counted that died is lost.
        """
        taken = self._group.foreach_env_runner(
            _take_faults, local_env_runner=False, timeout_seconds=_PING_TIMEOUT_S
        )
        return sum(taken, Faults())

    def last_failures(self) -> list[str]:
        """Why episodes failed lately, one line from every actor that saw a failure."""
        failures = self._group.foreach_env_runner(
            lambda runner: runner.env.unwrapped.task.last_failure,
            local_env_runner=False,
            timeout_seconds=_PING_TIMEOUT_S,
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
    own_seed = derived_seed(seed, iteration, runner.worker_index)
    reset_env_runner(runner, own_seed)
    seed_everything(own_seed)


def _take_faults(runner: Any) -> Faults:
    task = runner.env.unwrapped.task
    failed, failures = task.take_failures()
    retries, cause = task.scorer.take_retries()
    return Faults(failed, retries, failures, frozenset([cause] if retries else []))


def _fits_context(
    runner: Any, *, prompts: list[str], system: str | None, max_new_tokens: int
) -> list[bool]:
    llm = runner.env.unwrapped.task.llm
    room = llm.context_tokens - max_new_tokens
    return [len(llm.prompt_ids(prompt, system)) <= room for prompt in prompts]


def _decode(
    runner: Any,
    *,
    place: int,
    prompts: list[str],
    openings: list[str],
    num_slots: int,
    settings: DecodeSettings,
    system: str | None,
    spec: AgentSpec | None,
    weights: dict[str, Tensor] | None,
    seed: int,
) -> tuple[int, list[DecodedAnswer] | MaraError, int]:
    """Runs in the actor. An exception would end the actor, so a known one is returned."""
    llm = runner.env.unwrapped.task.llm
    blend = None
    if spec is not None and weights is not None:
        agent = Agent(spec)
        agent.load_state_dict(weights)
        blend = Blend.of([agent.to(llm.device)])
    try:
        requests = [
            DecodeRequest.of(
                llm,
                prompt,
                settings.model_copy(update={"seed": derived_seed(seed, number)}),
                blend=blend,
                system=system,
                opening=opening,
            )
            for number, (prompt, opening) in enumerate(zip(prompts, openings, strict=True))
        ]
        decoder = Decoder(llm, min(num_slots, len(prompts)))
        answers = decoder.run(requests)
    except MaraError as error:
        return place, error, 0
    return place, answers, decoder.token_forwards
