"""Score services by URL: what `ScoreClient` gets from one over real HTTP, with a key."""

import asyncio
import math
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx2
import numpy as np
import pytest
from endpoints import serving
from local_cluster import free_ports
from ray import serve
from starlette.responses import HTMLResponse
from starlette.types import Receive, Scope, Send
from tiny_checkpoints import BeaverFolder

from mara_rl.common.errors import ConfigError, DataError, RetryableError
from mara_rl.score_models.loading import load_score_model
from services.cluster.ray_session import ray_session
from services.http.api_keys import ApiKeys
from services.scoring.score_api import MAX_BODY_BYTES, create_score_api, keyed_score_application
from services.scoring.score_client import ScoreClient, ScoreClientConfig
from services.scoring.score_service import ScoreServiceConfig, check_hosts
from services.scoring.score_sources import check_url

KEY, OTHER = "the-key-of-the-tests", "another-key-of-theirs"


class Lengths:
    """Scores an answer by its length; some prompts get it into trouble."""

    def __init__(self) -> None:
        self.calls = 0

    async def score(self, pairs: list[tuple[str, str]]) -> Sequence[float]:
        self.calls += 1
        prompt = pairs[0][0]
        if prompt == "hangs":
            await asyncio.sleep(3)
        if prompt == "fails":
            raise ValueError("no score for that\nsecond line")
        if prompt == "fails once" and self.calls == 1:
            raise RetryableError("out of GPU memory")
        special = {"nan": math.nan, "inf": -math.inf}
        scores = [special.get(prompt, len(answer) + 0.1) for prompt, answer in pairs]
        return scores[1:] if prompt == "forgets one" else scores


class TroubledProxy:
    """An ASGI application before another one: it answers the first ``count`` calls itself."""

    def __init__(self, app: Callable, status: int, count: int) -> None:
        self.app, self.status, self.count = app, status, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.count:
            self.count -= 1
            await HTMLResponse("<h1>nobody here</h1>", self.status)(scope, receive, send)
            return
        await self.app(scope, receive, send)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARA_SCORE_KEY", KEY)


@pytest.fixture
def lengths() -> Lengths:
    return Lengths()


@pytest.fixture
def url(lengths: Lengths) -> Iterator[str]:
    with serving(api(lengths)) as running:
        yield running


def api(lengths: Lengths) -> Callable:
    return create_score_api(lengths.score, "lengths", ApiKeys([OTHER, KEY]))


def client(url: str, **settings: float) -> ScoreClient:
    return ScoreClient(ScoreClientConfig(sources={"reward": url}, **({"backoff_s": 0} | settings)))


def test_scores_come_exactly_and_those_that_are_not_finite_stay_missing(url: str) -> None:
    scorer = client(f"{url}/")
    scores = scorer.score([("p", "é" * 7), ("nan", "r"), ("inf", "r"), ("\ud7ff\n", "")])
    np.testing.assert_array_equal(scores[:, 0], [7.1, np.nan, np.nan, 0.1])
    assert scorer.counters["non_finite/reward"] == 2
    assert scorer.counters["retries/reward"] == scorer.counters["missing/reward"] == 0
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(scorer)).score([("p", "abc")]),  # noqa: S301
        [[3.1]],
    )
    assert KEY.encode() not in pickle.dumps(scorer), "it is of the process that asks"


@pytest.mark.parametrize("given", ["a-key-nobody-knows", f"{KEY}x"])
def test_without_a_key_that_is_known_nothing_is_told(
    url: str, lengths: Lengths, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("MARA_SCORE_KEY", given)
    with pytest.raises(RetryableError, match=r"the API key is not known \(status 401\)") as caught:
        client(url).score([("p", "r")])
    assert given not in str(caught.value)
    with pytest.raises(ConfigError, match=r"not known \(status 401\); expected one that runs"):
        check_url(url, "lengths")
    monkeypatch.delenv("MARA_SCORE_KEY")
    with pytest.raises(ConfigError, match="score 'reward': MARA_SCORE_KEY is not set: expected a"):
        client(url).score([("p", "r")])
    for path in ("/v1/model", "/v1/score", "/docs", "/openapi.json"):
        assert httpx2.get(url + path).status_code in (401, 404, 405)
    assert lengths.calls == 0


def test_a_key_is_asked_for_before_the_body_is_read(url: str) -> None:
    body = b"x" * (MAX_BODY_BYTES + 1)
    assert httpx2.post(f"{url}/v1/score", content=body[:10]).status_code == 401
    known = {"Authorization": f"Bearer {OTHER}"}
    refused = httpx2.post(f"{url}/v1/score", content=body, headers=known)
    assert refused.status_code == 413
    assert refused.json()["error"]["code"] == "body_too_large"
    for wrong in (b"", b"{}", b'{"pairs": [["p"]]}', b'{"pairs": [], "x": 1}'):
        refused = httpx2.post(f"{url}/v1/score", content=wrong, headers=known)
        assert refused.status_code == 400
        assert "expected" in refused.json()["error"]["message"]


def test_the_first_of_several_keys_is_sent(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARA_SCORE_KEY", f"{OTHER},a-key-nobody-knows")
    assert client(url).score([("p", "r")])[0, 0] == 1.1


def test_a_model_that_fails_is_not_asked_again(url: str, lengths: Lengths) -> None:
    with pytest.raises(DataError, match=r"'reward' from http://.*: ValueError: no score for that"):
        client(url).score([("fails", "r")])
    assert lengths.calls == 1
    with pytest.raises(DataError, match="score 'reward': expected 2 numbers"):
        client(url).score([("forgets one", "r"), ("p", "r")])


def test_a_service_in_passing_trouble_is_asked_again(lengths: Lengths) -> None:
    for trouble in (TroubledProxy(api(lengths), 502, 2), TroubledProxy(api(lengths), 200, 2)):
        with serving(trouble) as url:
            scorer = client(url)
            assert scorer.score([("p", "rr")])[0, 0] == 2.1
            assert scorer.counters["retries/reward"] == 2
    lengths.calls = 0
    with serving(api(lengths)) as url:
        scorer = client(url)
        assert scorer.score([("fails once", "r")])[0, 0] == 1.1
        assert scorer.counters["retries/reward"] == 1


def test_the_deadline_holds_when_the_service_hangs_or_is_gone(url: str) -> None:
    scorer = client(url, deadline_s=1.0, max_attempts=2)
    began = time.monotonic()
    with pytest.raises(RetryableError, match=r"score 'reward' from .*: no answer within"):
        scorer.score([("hangs", "r")])
    assert time.monotonic() - began < 2
    assert scorer.counters["retries/reward"] == 1
    [port] = free_ports(1)
    with pytest.raises(RetryableError, match="ConnectError"):
        client(f"http://127.0.0.1:{port}", deadline_s=2.0).score([("p", "r")])


def test_a_url_has_to_lead_to_the_model_that_is_meant(url: str) -> None:
    check_url(url, "lengths")
    with pytest.raises(ConfigError, match="hosts 'lengths', not 'another'"):
        check_url(url, "another")
    with pytest.raises(ConfigError, match=r"elsewhere: status 404; expected one that runs and"):
        check_url(f"{url}/elsewhere", "lengths")
    with pytest.raises(ConfigError, match="'http://a:b' is no URL"):
        check_url("http://a:b", "lengths")


@pytest.mark.slow
def test_an_application_of_ray_serve_answers_by_url_and_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ScoreServiceConfig(model=str(BeaverFolder(tmp_path / "m").write()), num_cpus=0.1)
    pairs = [(f"prompt {i}", f"an answer {'at length ' * (i % 7)}") for i in range(40)]
    expected = load_score_model(config.model, device="cpu").score(pairs)
    [port] = free_ports(1)
    with ray_session(num_cpus=2):
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(keyed_score_application(config), name="reward", route_prefix="/reward")
        url = f"http://127.0.0.1:{port}/reward"
        check_url(url, config.model)
        check_hosts("reward", config.model)
        for source in (url, "reward"):
            scores = client(source).score(pairs)[:, 0]
            np.testing.assert_allclose(scores, expected, atol=1e-5)
        monkeypatch.setenv("MARA_SCORE_KEY", "a-key-nobody-knows")
        with pytest.raises(ConfigError, match="status 401"):
            check_url(url, config.model)


@pytest.mark.slow
def test_a_service_without_keys_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MARA_SCORE_KEY")
    config = ScoreServiceConfig(model=str(BeaverFolder(tmp_path / "m").write()), num_cpus=0.1)
    with ray_session(num_cpus=1):
        serve.start(proxy_location="Disabled")
        with pytest.raises(RuntimeError, match="application reward failed"):
            serve.run(keyed_score_application(config), name="reward", route_prefix="/reward")
        [deployment] = serve.status().applications["reward"].deployments.values()
        assert "no keys: set MARA_SCORE_KEY" in deployment.message
