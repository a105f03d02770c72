"""Scores of all methods' answers by all judges, each pair of texts scored once, ever."""

import contextlib
import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from mara_rl.common.display import Display
from mara_rl.common.errors import ConfigError, DataError, MaraError
from mara_rl.common.urls import is_http_url
from mara_rl.evaluation.answers import Answer
from mara_rl.evaluation.fingerprints import score_model_sha256
from mara_rl.evaluation.plan import AXES, EvaluationPlan, Judge
from mara_rl.evaluation.prompt_set import PromptSet
from mara_rl.evaluation.score_cache import ScoreCache
from mara_rl.llm.policy_llm import DType, placement
from mara_rl.score_models.loading import load_score_model, shipped_names

_BATCH = 64

Scores = dict[str, np.ndarray]  # by axis, (N, R) each


class _Scorer(Protocol):
    def score(self, pairs: Sequence[tuple[str, str]]) -> Sequence[float]: ...


@dataclass(frozen=True)
class ScoreSource:
    """Where the scores of one axis of one judge come from.

    Attributes:
        dtype: of the model in this process; None for a score service.
        identity: names the model and the content of its files; scores are cached under it.
        sha256: of its files; "" where they are not here.
    """

    judge: str
    axis: str
    model: str
    dtype: DType | None
    identity: str
    sha256: str


def score_sources(plan: EvaluationPlan) -> dict[tuple[str, str], ScoreSource]:
    """All score models of a plan by (judge, axis); those behind Serve need a connection to Ray.

    Raises ConfigError for one that is not there.
    """
    sources = {}
    for name, judge in plan.judges.items():
        for axis in AXES:
            sources[name, axis] = _source(name, axis, judge)
    return sources


def _source(name: str, axis: str, judge: Judge) -> ScoreSource:
    model = judge.model(axis)
    if judge.serve:
        return _served_source(name, axis, model)
    sha256 = score_model_sha256(model)
    device, dtype = placement(None, judge.dtype)
    return ScoreSource(name, axis, model, dtype, f"{sha256} {device.type} {dtype}", sha256)


def _served_source(judge: str, axis: str, service: str) -> ScoreSource:
    if is_http_url(service):
        from services.scoring.score_sources import UrlScores

        try:
            identity = f"{service} {UrlScores(service).model()}"
        except MaraError as error:
            raise ConfigError(f"judges.{judge}.{axis}: score service {service}: {error}") from error
        return ScoreSource(judge, axis, service, None, identity, "")
    from services.scoring.score_service import deployed_score

    config = deployed_score(service)
    if config is None:
        raise ConfigError(f"judges.{judge}.{axis}: no Serve application {service!r} is running")
    # A model that lies on another machine's disk is known by its name alone.
    here = config.model in shipped_names() or Path(config.model).is_dir()
    sha256 = score_model_sha256(config.model) if here else ""
    return ScoreSource(
        judge, axis, service, None, f"serve {config.model} {sha256} {config.dtype}", sha256
    )


class Judging:
    """Scores answers; what one failing judge had scored before stays in the cache."""

    def __init__(
        self,
        prompts: PromptSet,
        sources: Mapping[tuple[str, str], ScoreSource],
        cache: ScoreCache,
        display: Display,
    ) -> None:
        self._prompts = prompts
        self._sources = sources
        self._cache = cache
        self._display = display

    def scores(
        self, judge: str, tables: Mapping[str, Sequence[Sequence[Answer]]]
    ) -> dict[str, Scores]:
        """One judge's scores by method and axis, (N, R) each.

        Raises DataError for a judge that fails, and for a score that is not finite, naming method,
        prompt and judge.
        """
        found: dict[str, Scores] = {name: {} for name in tables}
        for axis in AXES:
            known = self._known(self._sources[judge, axis], tables)
            for name, table in tables.items():
                pairs = [self._pair(row, answer) for row, a in enumerate(table) for answer in a]
                values = np.array([known[pair] for pair in pairs])
                found[name][axis] = values.reshape(len(table), -1)
        return found

    def _pair(self, row: int, answer: Answer) -> tuple[str, str]:
        return self._prompts.prompts[row].text, answer.text

    def _known(
        self, source: ScoreSource, tables: Mapping[str, Sequence[Sequence[Answer]]]
    ) -> dict[tuple[str, str], float]:
        where: dict[tuple[str, str], tuple[str, str]] = {}  # pair: (method, prompt id)
        for name, table in tables.items():
            for row, answers in enumerate(table):
                for answer in answers:
                    where.setdefault(self._pair(row, answer), (name, answer.id))
        known = self._cache.get(source.identity, where)
        # Score models read a prompt once for all answers to it; like lengths waste no padding.
        todo = sorted(where.keys() - known.keys(), key=lambda pair: (len(pair[0]), *pair))
        if not todo:
            return known
        title = f"{source.axis} by {source.judge}"
        with (
            self._display.phase(title, total=len(where), done=len(known)) as phase,
            _scorer(source) as scorer,
        ):
            for first in range(0, len(todo), _BATCH):
                batch = todo[first : first + _BATCH]
                values = self._scored(source, scorer, batch)
                fresh = dict(zip(batch, values, strict=True))
                finite = {pair: v for pair, v in fresh.items() if math.isfinite(v)}
                self._cache.put(source.identity, finite)
                for pair, value in fresh.items():
                    if pair not in finite:
                        method, prompt_id = where[pair]
                        raise DataError(
                            f"judge {source.judge!r}: {source.axis} of method {method!r}, prompt "
                            f"{prompt_id!r}, by {source.model} is {value}; expected a finite number"
                        )
                known |= fresh
                phase.advance(len(batch))
        return known

    @staticmethod
    def _scored(
        source: ScoreSource, scorer: _Scorer, batch: Sequence[tuple[str, str]]
    ) -> list[float]:
        try:
            return [float(value) for value in scorer.score(batch)]
        except (MaraError, RuntimeError, ValueError) as error:
            kind = type(error) if isinstance(error, MaraError) else DataError
            raise kind(
                f"judge {source.judge!r}: {source.axis} by {source.model} failed: {error} "
                "(what it had scored is kept)"
            ) from error


class _ServedScores:
    """One score service as a scorer."""

    def __init__(self, service: str) -> None:
        from services.scoring.score_client import ScoreClient, ScoreClientConfig

        self._client = ScoreClient(ScoreClientConfig(sources={"score": service}))

    def score(self, pairs: Sequence[tuple[str, str]]) -> Sequence[float]:
        return self._client.score(pairs)[:, 0].tolist()


@contextlib.contextmanager
def _scorer(source: ScoreSource) -> Iterator[_Scorer]:
    if source.dtype is None:
        yield _ServedScores(source.model)
        return
    model = load_score_model(source.model, dtype=source.dtype)
    yield model
    del model
    gc.collect()
