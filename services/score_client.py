"""Scores from Ray Serve for rollout actors: deadlines, bounded retries, nothing invented."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)

from envs.in_process_scorer import finite_or_nan
from mara_rl.errors import ConfigError, DataError, MaraError, RetryableError

logger = logging.getLogger(__name__)


class ScoreClientConfig(BaseModel):
    """Where the scores come from and how long to try."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    apps: dict[str, str] = Field(
        {"reward": "reward", "cost": "cost"},
        min_length=1,
        description="score name to the Serve application that gives it",
    )
    deadline_s: float = Field(120.0, gt=0, description="time for one `score` call, retries and all")
    max_attempts: int = Field(3, ge=1, description="attempts for each score within the deadline")
    partial: bool = Field(
        False, description="give the scores that came as far as others are missing"
    )
    backoff_s: float = Field(0.5, ge=0, description="bound of the first random wait; then doubled")


class ScoreClient:
    """`envs.protocols.Scorer` over Serve applications; picklable, connects on first use.

    The scores are asked for in parallel, each with one list call. An attempt that fails because a
    replica died, was overloaded or did not answer is repeated; attempt i of n may take
    1/(n - i + 1) of the time left, so that a replica that hangs leaves time for another one.

    Attributes:
        names: names of the scores, in the order of the columns.
        counters: since the start, ``calls`` and ``pairs``, and for each score ``retries/<name>``
            (attempts beyond the first), ``missing/<name>`` (pairs without an answer in time) and
            ``non_finite/<name>`` (pairs whose answer was NaN or infinite).
    """

    def __init__(self, config: ScoreClientConfig) -> None:
        self.names = tuple(config.apps)
        self.counters: Counter[str] = Counter()
        self._config = config
        self._handles: dict[str, DeploymentHandle] = {}

    def __reduce__(self) -> tuple[type["ScoreClient"], tuple[ScoreClientConfig]]:
        return ScoreClient, (self._config,)

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Scores (len(pairs), len(names)), float64.

        NaN stands for a score that was not finite or, with ``partial``, did not come in time; both
        are counted.

        Raises:
            RetryableError: a score did not come within the deadline; with ``partial``, none did.
            DataError: a model failed on these pairs or gave a wrong number of scores.
            ConfigError: there is no Ray, no Serve or no such application to ask.
        """
        scores = np.full((len(pairs), len(self.names)), np.nan)
        if not pairs:
            return scores
        self.counters.update(calls=1, pairs=len(pairs))
        handles = [self._handle(name) for name in self.names]
        failures: list[str] = []
        with ThreadPoolExecutor(len(handles)) as pool:
            answers = [
                pool.submit(self._ask, name, handle, list(pairs))
                for name, handle in zip(self.names, handles, strict=True)
            ]
        for column, (name, answer) in enumerate(zip(self.names, answers, strict=True)):
            try:
                scores[:, column] = finite_or_nan(name, answer.result(), len(pairs))
            except RetryableError as error:
                self.counters[f"missing/{name}"] += len(pairs)
                failures.append(str(error))
                logger.warning("%s; %d answers go without it", error, len(pairs))
            else:
                self.counters[f"non_finite/{name}"] += int(np.isnan(scores[:, column]).sum())
        if failures and (not self._config.partial or len(failures) == len(self.names)):
            raise RetryableError("; ".join(failures))
        return scores

    def _handle(self, name: str) -> DeploymentHandle:
        if name not in self._handles:
            app = self._config.apps[name]
            if not ray.is_initialized():
                raise ConfigError(f"score {name!r}: not connected to Ray, which serves app {app!r}")
            try:
                self._handles[name] = serve.get_app_handle(app)
            except RayServeException as error:
                raise ConfigError(
                    f"score {name!r}: no Serve application {app!r}: {error}"
                ) from error
        return self._handles[name]

    def _ask(self, name: str, handle: DeploymentHandle, pairs: list[tuple[str, str]]) -> Any:
        config = self._config

        def count_retry(_: RetryCallState) -> None:
            self.counters[f"retries/{name}"] += 1

        retrying = Retrying(
            retry=retry_if_exception(_may_succeed_later),
            stop=stop_after_attempt(config.max_attempts) | stop_before_delay(config.deadline_s),
            wait=wait_random_exponential(multiplier=config.backoff_s, max=config.deadline_s),
            before_sleep=count_retry,
            reraise=True,
        )
        deadline_s = time.monotonic() + config.deadline_s
        try:
            for attempt in retrying:
                with attempt:
                    attempts_left = config.max_attempts - attempt.retry_state.attempt_number + 1
                    return _call(handle, pairs, (deadline_s - time.monotonic()) / attempts_left)
        except (RayError, RayServeException, RetryableError) as error:
            reason = f"score {name!r} from app {config.apps[name]!r}: {_one_line(error)}"
            kind = RetryableError if _may_succeed_later(error) else DataError
            raise kind(reason) from error
        raise AssertionError("tenacity ends by a return or an exception")


def _call(handle: DeploymentHandle, pairs: list[tuple[str, str]], timeout_s: float) -> Any:
    response = handle.score.remote(pairs)
    try:
        return response.result(timeout_s=timeout_s)
    except TimeoutError as error:
        response.cancel()
        raise RetryableError(f"no answer within {timeout_s:.3g} s") from error


def _may_succeed_later(error: BaseException) -> bool:
    """A dead, overloaded or unreachable replica may recover; a model that raised would again."""
    if isinstance(error, RayTaskError):
        return isinstance(error.cause, RetryableError)
    return isinstance(error, RayError | RayServeException | RetryableError)


def _one_line(error: BaseException) -> str:
    if isinstance(error, RayTaskError):
        error = error.cause
    if isinstance(error, MaraError):  # a sentence for the user already
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
