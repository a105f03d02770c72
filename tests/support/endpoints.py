"""Endpoints over small LLMs, in this process and on a loopback port."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import uvicorn
from ray_metrics import one_ray_node
from small_agents import random_agent
from starlette.types import ASGIApp

from mara_rl.agents.agent import Agent
from mara_rl.common.errors import DataError
from mara_rl.decoding.decoder import Decoder
from mara_rl.llm.policy_llm import PolicyLLM
from services.endpoint.agent_catalog import ServedAgent
from services.endpoint.decode_loop import DecodeLoop
from services.endpoint.decode_plan import ApiLimits, Backend
from services.endpoint.endpoint import Endpoint
from services.endpoint.openai_api import create_api
from services.endpoint.token_report import TokenReport
from services.http.api_keys import ApiKeys

LLM = "tiny-llm"
AGENT = "mara-tiny@champion"


class FixedCatalog:
    """`AgentCatalog` of agents that do not change unless a test does it."""

    def __init__(self, agents: Mapping[str, Agent]) -> None:
        self.agents = {
            name: ServedAgent(f"{name.partition('@')[0]}/1", agent, 1)
            for name, agent in agents.items()
        }
        self.closed = False

    def names(self) -> Sequence[tuple[str, ServedAgent]]:
        return list(self.agents.items())

    def loaded(self, name: str) -> ServedAgent | None:
        return self.agents.get(name)

    def load(self, name: str) -> ServedAgent:
        raise DataError(f"model {name!r} does not exist")

    def close(self) -> None:
        self.closed = True


class LengthScorer:
    """Reward is an answer's length, cost its number of spaces."""

    names = ("reward", "cost")

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        return np.array([[len(text), text.count(" ")] for _, text in pairs], dtype=float)


def make_backend(
    llm: PolicyLLM,
    *,
    agents: Mapping[str, Agent] | None = None,
    slots: int = 4,
    max_waiting: int = 32,
    scorer: object = None,
    step_s: float = 0.0,
) -> Backend:
    """``step_s`` is added to every decode step, for answers that last."""
    if agents is None:
        agents = {AGENT: random_agent(llm, "relative", top_k=6, llm=llm.name)}
    decoder = Decoder(llm, slots)
    step = decoder.step
    if step_s:
        decoder.step = lambda: (time.sleep(step_s), step())[1]
    decode_loop = DecodeLoop(decoder, max_waiting=max_waiting)
    decode_loop.start()
    catalog = FixedCatalog(agents)
    return Backend(LLM, llm, decode_loop, catalog, scorer, TokenReport(llm), deployed=1)


@contextlib.contextmanager
def running_endpoint(
    backend: Backend | Callable[[], Backend],
    *,
    keys: Sequence[str] = (),
    limits: ApiLimits | None = None,
    log_text: bool = False,
    others_loaded: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[str, Endpoint]]:
    """Its URL, and the endpoint; a backend that is a function loads in the background."""
    limits = limits or ApiLimits()
    later = callable(backend)
    with one_ray_node():
        endpoint = Endpoint(
            backend if callable(backend) else lambda: backend,
            ApiKeys(keys, max_concurrent=limits.max_concurrent),
            limits,
            log_text=log_text,
            others_loaded=others_loaded,
        )
        if later:
            endpoint.load_in_background()
        else:
            endpoint.load()
        with serving(create_api(endpoint)) as url:
            try:
                yield url, endpoint
            finally:
                endpoint.close()  # first: the server waits for answers that still run


@contextlib.contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """The URL of an ASGI application on a loopback port."""
    # Its own logging would keep the stream that a test captures.
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
