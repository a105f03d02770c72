import math
import os
import pickle
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import ray
from pydantic import ValidationError
from ray import cloudpickle, serve

from envs.in_process_scorer import InProcessScorer, finite_or_nan
from mara_rl.common.errors import ConfigError, DataError, RetryableError
from services.cluster.ray_session import ray_session
from services.scoring.score_client import ScoreClient, ScoreClientConfig
from services.scoring.score_service import ScoreService, ScoreServiceConfig

HANG_S = 6.0


class TroubledModel:
    """Scores an answer by its length; prompts that name this model get it into trouble."""

    def __init__(self, name: str) -> None:
        self.name = name

    def score(self, pairs: list[tuple[str, str]]) -> list[float]:
        prompts = {prompt for prompt, _ in pairs}
        if f"{self.name} is slow" in prompts:
            time.sleep(1.5)
        if f"{self.name} hangs" in prompts:
            time.sleep(HANG_S)
        if f"{self.name} fails" in prompts:
            raise ValueError("no score for that\nsecond line")
        if f"{self.name} forgets one" in prompts:
            pairs = pairs[1:]
        special = {f"{self.name} gives nan": math.nan, f"{self.name} gives inf": math.inf}
        return [special.get(prompt, float(len(response))) for prompt, response in pairs]


class TroubledService(ScoreService):
    def _load_model(self) -> TroubledModel:
        return TroubledModel(self._config.model)

    async def score(self, pairs: list[tuple[str, str]]) -> list[float]:
        if pairs[0][0] == f"{self._config.model} miscounts":
            return [0.0]
        return await super().score(pairs)

    async def pid(self) -> int:
        return os.getpid()


@pytest.fixture(scope="module")
def apps() -> Iterator[None]:
    """``reward`` and ``cost`` with one replica each, and ``busy``, which takes one call."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # replicas cannot import tests
    troubled = serve.deployment(
        TroubledService,
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=32,
        health_check_period_s=1,
    )
    busy = troubled.options(max_ongoing_requests=1, max_queued_requests=1)
    with ray_session(num_cpus=2):
        serve.start(proxy_location="Disabled")
        serve.run_many(
            [
                serve.RunTarget(
                    deployment.bind(ScoreServiceConfig(model=name, max_batch_size=16)),
                    name=name,
                    route_prefix=None,
                )
                for name, deployment in (("reward", troubled), ("cost", troubled), ("busy", busy))
            ]
        )
        yield


def client(*names: str, **settings: float) -> ScoreClient:
    names = names or ("reward", "cost")
    return ScoreClient(ScoreClientConfig(sources={name: name for name in names}, **settings))


def test_in_process_scorer():
    scorer = InProcessScorer({"reward": TroubledModel("reward"), "cost": TroubledModel("cost")})
    scores = scorer.score([("p", "abc"), ("cost gives inf", "a"), ("reward gives nan", "")])
    assert scorer.names == ("reward", "cost")
    assert scores.dtype == np.float64
    np.testing.assert_array_equal(scores, [[3, 3], [1, np.nan], [np.nan, 0]])
    assert scorer.counters == {
        "calls": 1,
        "pairs": 3,
        "non_finite/reward": 1,
        "non_finite/cost": 1,
    }
    assert scorer.score([]).shape == (0, 2)
    with pytest.raises(DataError, match="'cost': expected 1 numbers"):
        scorer.score([("cost forgets one", "a")])


@pytest.mark.parametrize("answer", [[1.0], [1.0, 2.0, 3.0], [[1.0], [2.0]], ["a", "b"], None])
def test_an_answer_that_is_not_one_number_a_pair_is_refused(answer):
    with pytest.raises(DataError, match="score 'cost': expected 2 numbers"):
        finite_or_nan("cost", answer, 2)


def test_config_names_what_is_wrong():
    with pytest.raises(ValidationError, match="deadline_s"):
        ScoreClientConfig(deadline_s=0)
    with pytest.raises(ValidationError, match="sources"):
        ScoreClientConfig(sources={})


def test_without_ray_the_client_says_so_and_starts_none():
    assert not ray.is_initialized()
    with pytest.raises(ConfigError, match="'reward': not connected to Ray"):
        client().score([("p", "r")])
    assert not ray.is_initialized()


@pytest.mark.slow
class TestOnCluster:
    def test_one_column_for_each_score(self, apps):
        scorer = client()
        scores = scorer.score([("p", "r" * i) for i in range(64)])
        assert scores.dtype == np.float64
        np.testing.assert_array_equal(scores, np.repeat(np.arange(64.0)[:, None], 2, axis=1))
        assert scorer.score([]).shape == (0, 2)
        assert scorer.counters["calls"] == 1
        assert scorer.counters["pairs"] == 64
        assert scorer.counters["retries/reward"] == scorer.counters["missing/cost"] == 0

    def test_a_used_client_can_be_pickled_into_an_actor(self, apps):
        scorer = client()
        scorer.score([("p", "r")])

        @ray.remote(num_cpus=0)
        class Runner:
            def __init__(self, pickled: bytes) -> None:
                self.scorer = pickle.loads(pickled)  # noqa: S301

            def score(self, pairs: list[tuple[str, str]]) -> np.ndarray:
                return self.scorer.score(pairs)

        runner = Runner.remote(pickle.dumps(scorer))
        scores = ray.get(runner.score.remote([("p", "four")]))
        np.testing.assert_array_equal(scores, [[4, 4]])
        ray.kill(runner)

    def test_scores_are_asked_for_in_parallel(self, apps):
        scorer = client()
        scorer.score([("p", "r")])
        began = time.monotonic()
        scorer.score([("reward is slow", "r"), ("cost is slow", "r")])
        assert 1.4 < time.monotonic() - began < 2.8

    def test_a_replica_killed_in_mid_call_is_survived(self, apps):
        scorer = client()
        scorer.score([("p", "r")])
        pid = serve.get_app_handle("reward").pid.remote().result(timeout_s=10)
        killer = threading.Timer(0.7, os.kill, (pid, signal.SIGKILL))
        killer.start()
        scores = scorer.score([("reward is slow", "r" * i) for i in range(20)])
        killer.join()
        np.testing.assert_array_equal(scores, np.repeat(np.arange(20.0)[:, None], 2, axis=1))
        assert scorer.counters["retries/reward"] >= 1
        assert scorer.counters["retries/cost"] == 0
        assert serve.get_app_handle("reward").pid.remote().result(timeout_s=10) != pid

    def test_non_finite_scores_stay_missing_and_are_counted(self, apps):
        scorer = client()
        scores = scorer.score([("reward gives nan", "r"), ("p", "rr"), ("cost gives inf", "r")])
        np.testing.assert_array_equal(scores, [[np.nan, 1], [2, 2], [1, np.nan]])
        assert scorer.counters["non_finite/reward"] == scorer.counters["non_finite/cost"] == 1
        assert scorer.counters["missing/reward"] == 0

    @pytest.mark.parametrize("trouble", ["reward miscounts", "reward forgets one"])
    def test_a_wrong_number_of_scores_is_refused(self, apps, trouble):
        scorer = client()
        with pytest.raises(DataError, match="score 'reward'"):
            scorer.score([(trouble, "r"), ("p", "r")])

    def test_a_model_that_fails_is_not_asked_again(self, apps):
        scorer = client()
        with pytest.raises(DataError) as failure:
            scorer.score([("cost fails", "r")])
        assert str(failure.value) == "score 'cost' from app 'cost': ValueError: no score for that"
        assert scorer.counters["retries/cost"] == 0

    def test_an_overloaded_service_is_asked_again(self, apps):
        serve.get_app_handle("busy").pid.remote().result(timeout_s=10)
        callers = [client("busy", max_attempts=8, backoff_s=1.0) for _ in range(4)]
        answers: list[np.ndarray] = []
        threads = [
            threading.Thread(
                target=lambda c=caller: answers.append(c.score([("busy is slow", "rr")]))
            )
            for caller in callers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        np.testing.assert_array_equal(answers, np.full((4, 1, 1), 2.0))

    def test_a_missing_application_is_named(self, apps):
        with pytest.raises(ConfigError, match="score 'fluency': no Serve application 'fluency'"):
            client("reward", "fluency").score([("p", "r")])

    def test_the_deadline_holds_when_one_model_hangs_and_when_all_do(self, apps):
        scorer = client(deadline_s=2.0, max_attempts=2, backoff_s=0.1, partial=True)
        scorer.score([("p", "r")])
        began = time.monotonic()
        scores = scorer.score([("cost hangs", "rrr"), ("p", "r")])
        assert time.monotonic() - began < 3
        np.testing.assert_array_equal(scores, [[3, np.nan], [1, np.nan]])
        assert scorer.counters["missing/cost"] == 2
        assert scorer.counters["missing/reward"] == 0
        assert scorer.counters["retries/cost"] == 1
        retries, cause = scorer.take_retries()
        assert (retries, scorer.take_retries()[0]) == (1, 0)
        assert re.match(r"score 'cost' from .*: no answer within", cause)

        began = time.monotonic()
        with pytest.raises(RetryableError, match=r"'reward' .*no answer within .*'cost' .*no ans"):
            scorer.score([("cost hangs", "r"), ("reward hangs", "r")])
        assert time.monotonic() - began < 3

        with pytest.raises(RetryableError, match=r"'cost' .*no answer within"):
            client(deadline_s=1.0, max_attempts=1).score([("cost hangs", "r")])

        # What hung was dropped from the queue: once awake, the models answer others again.
        time.sleep(HANG_S)
        patient = client(deadline_s=30.0)
        np.testing.assert_array_equal(patient.score([("p", "rr")]), [[2, 2]])
        assert patient.counters["retries/cost"] == 0
