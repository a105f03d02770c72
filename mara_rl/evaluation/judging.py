"""Scores of all methods' answers by all judges, each pair of texts scored once, ever."""

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
Pair = tuple[str, str]  # prompt, answer
_Scorer = Callable[[Sequence[Pair]], ArrayLike]  # scores (B,) or (B, sources)


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
            raise type(error)(f"judges.{judge}.{axis}: score service {service}: {error}") from error
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
        plan: EvaluationPlan,
        prompts: PromptSet,
        sources: Mapping[tuple[str, str], ScoreSource],
        cache: ScoreCache,
        display: Display,
    ) -> None:
        self._plan = plan
        self._prompts = prompts
        self._sources = sources
        self._cache = cache
        self._display = display

    def scores(
        self, judge: str, tables: Mapping[str, Sequence[Sequence[Answer]]]
    ) -> dict[str, Scores]:
        """One judge's scores by method and axis, (N, R) each.

        Where the plan leaves out unscored prompts, NaN stands for a score that is not finite.
        Raises DataError for a judge that fails, and otherwise for such a score, naming method,
        prompt and judge.
        """
        sources = [self._sources[judge, axis] for axis in AXES]
        # Services are asked at the same time; of models in this process one is loaded at a time.
        groups = [sources] if self._plan.judges[judge].serve else [[each] for each in sources]
        known: dict[str, dict[Pair, float]] = {}
        for group in groups:
            known |= self._known(judge, group, tables)
        return {
            name: {axis: self._table(known[axis], table) for axis in AXES}
            for name, table in tables.items()
        }

    def _table(
        self, known: Mapping[Pair, float], table: Sequence[Sequence[Answer]]
    ) -> NDArray[np.float64]:
        return np.array(
            [[known[self._pair(row, a)] for a in answers] for row, answers in enumerate(table)]
        )

    def _pair(self, row: int, answer: Answer) -> Pair:
        return self._prompts.prompts[row].text, answer.text

    def _known(
        self,
        judge: str,
        sources: Sequence[ScoreSource],
        tables: Mapping[str, Sequence[Sequence[Answer]]],
    ) -> dict[str, dict[Pair, float]]:
        """Scores by axis, those that the cache lacks from these sources."""
        where: dict[Pair, tuple[str, str]] = {}  # method, prompt id
        for name, table in tables.items():
            for row, answers in enumerate(table):
                for answer in answers:
                    where.setdefault(self._pair(row, answer), (name, answer.id))
        known = {source.axis: self._cache.get(source.identity, where) for source in sources}
        # Score models read a prompt once for all answers to it; like lengths waste no padding.
        todo = sorted(
            (pair for pair in where if any(pair not in found for found in known.values())),
            key=lambda pair: (len(pair[0]), *pair),
        )
        if not todo:
            return known
        title = f"{' and '.join(known)} by {judge}"
        with (
            self._display.phase(title, total=len(where), done=len(where) - len(todo)) as phase,
            _scorer(self._plan.judges[judge], sources) as scorer,
        ):
            for first in range(0, len(todo), _BATCH):
                batch = todo[first : first + _BATCH]
                columns = _scored(sources, scorer, batch)
                for source, column in zip(sources, columns, strict=True):
                    fresh = dict(zip(batch, column, strict=True))
                    finite = {pair: value for pair, value in fresh.items() if math.isfinite(value)}
                    self._cache.put(source.identity, finite)
                    lacking = next((pair for pair in batch if pair not in finite), None)
                    if lacking is not None and not self._plan.leave_out_unscored:
                        method, prompt_id = where[lacking]
                        raise DataError(
                            f"judge {judge!r}: {source.axis} of method {method!r}, prompt "
                            f"{prompt_id!r}, by {source.model} is {fresh[lacking]}; expected a "
                            "finite number"
                        )
                    known[source.axis] |= dict.fromkeys(batch, math.nan) | finite
                phase.advance(len(batch))
        return known


def _scored(
    sources: Sequence[ScoreSource], scorer: _Scorer, batch: Sequence[Pair]
) -> list[list[float]]:
    """Scores by source and pair."""
    try:
        return np.asarray(scorer(batch), dtype=np.float64).reshape(len(batch), -1).T.tolist()
    except (MaraError, RuntimeError, ValueError) as error:
        kind = type(error) if isinstance(error, MaraError) else DataError
        what = " and ".join(f"{source.axis} by {source.model}" for source in sources)
        raise kind(
            f"judge {sources[0].judge!r}: {what} failed: {error} (what it had scored is kept)"
        ) from error


@contextlib.contextmanager
def _scorer(judge: Judge, sources: Sequence[ScoreSource]) -> Iterator[_Scorer]:
    """What scores pairs by these sources: services all at once, or one model in this process."""
    if judge.serve:
        from services.scoring.score_client import ScoreClient, ScoreClientConfig

        services = {source.axis: source.model for source in sources}
        yield ScoreClient(
            ScoreClientConfig(
                sources=services, deadline_s=judge.deadline_s, max_attempts=judge.max_attempts
            )
        ).score
        return
    [source] = sources
    model = load_score_model(source.model, dtype=source.dtype)
    yield model.score
    del model
    gc.collect()
