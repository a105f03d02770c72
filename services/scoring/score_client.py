"""Scores from score services for rollout actors: deadlines, bounded retries, nothing invented."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from pydantic import Field
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)

from envs.in_process_scorer import finite_or_nan
from mara_rl.common.errors import ConfigError, DataError, RetryableError
from mara_rl.common.yaml_settings import Section
from services.scoring.score_sources import ScoreSource, score_source

logger = logging.getLogger(__name__)


class ScoreClientConfig(Section):
    """Where the scores come from and how long to try."""

    sources: dict[str, str] = Field(
        {"reward": "reward", "cost": "cost"},
        min_length=1,
        description="score name to what gives it: a Serve application, or a score service's URL",
    )
    deadline_s: float = Field(120.0, gt=0, description="time for one `score` call, retries and all")
    max_attempts: int = Field(3, ge=1, description="attempts for each score within the deadline")
    partial: bool = Field(
        False, description="give the scores that came as far as others are missing"
    )
    backoff_s: float = Field(0.5, ge=0, description="bound of the first random wait; then doubled")


class ScoreClient:
    """`envs.protocols.Scorer` over score services; picklable, connects on first use.

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
        self.names = tuple(config.sources)
        self.counters: Counter[str] = Counter()
        self._retries = 0  # not yet taken
        self._last_retry = ""
        self._config = config
        self._sources: dict[str, ScoreSource] = {}

    def __reduce__(self) -> tuple[type["ScoreClient"], tuple[ScoreClientConfig]]:
        return ScoreClient, (self._config,)

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Scores (len(pairs), len(names)), float64.

        NaN stands for a score that was not finite or, with ``partial``, did not come in time; both
        are counted.

        Raises:
            RetryableError: a score did not come within the deadline; with ``partial``, none did.
            DataError: a model failed on these pairs or gave a wrong number of scores.
            ConfigError: there is no Ray, no such application or no key to ask with.
        """
        scores = np.full((len(pairs), len(self.names)), np.nan)
        if not pairs:
            return scores
        self.counters.update(calls=1, pairs=len(pairs))
        sources = [self._source(name) for name in self.names]
        failures: list[str] = []
        with ThreadPoolExecutor(len(sources)) as pool:
            answers = [
                pool.submit(self._ask, name, source, list(pairs))
                for name, source in zip(self.names, sources, strict=True)
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

    def take_retries(self) -> tuple[int, str]:
        """How often scores were asked for again since the last call, and why the last time."""
        taken, self._retries = self._retries, 0
        return taken, self._last_retry

    def _source(self, name: str) -> ScoreSource:
        if name not in self._sources:
            try:
                self._sources[name] = score_source(self._config.sources[name])
            except ConfigError as error:
                raise ConfigError(f"score {name!r}: {error}") from error
        return self._sources[name]

    def _ask(self, name: str, source: ScoreSource, pairs: list[tuple[str, str]]) -> Sequence[float]:
        config = self._config

        def count_retry(state: RetryCallState) -> None:
            self.counters[f"retries/{name}"] += 1
            failure = state.outcome.exception() if state.outcome else None
            self._retries += 1
            self._last_retry = f"score {name!r} from {source}: {failure}"
            logger.warning("%s; it is asked for again", self._last_retry)

        retrying = Retrying(
            retry=retry_if_exception_type(RetryableError),
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
                    return source.ask(pairs, (deadline_s - time.monotonic()) / attempts_left)
        except (DataError, RetryableError) as error:
            raise type(error)(f"score {name!r} from {source}: {error}") from error
        raise AssertionError("tenacity ends by a return or an exception")
