"""Remote learners that die or hang, whatever is asked of them next."""

import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import pytest
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from rich.console import Console

from envs.observation import observation_space
from mara_rl.agents.agent import Agent, AgentSpec
from mara_rl.common.display import Display
from mara_rl.training.config import load_config
from mara_rl.training.faults.lost_part import LostPart
from mara_rl.training.rllib.accept_module import AcceptModule
from mara_rl.training.rllib.learners import MODULE_ID, Learners
from services.cluster.ray_session import ray_session

pytestmark = pytest.mark.slow

SPEC = AgentSpec(hidden_size=8, head="relative", top_k=4)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_session():
        yield


@pytest.fixture
def group(cluster: None) -> Iterator[Any]:
    """RLlib's group of one remote learner."""
    observation = observation_space(
        SPEC.hidden_size, prefix=SPEC.needs_prefix, state_dtype="float32"
    )
    plain: Any = PPOConfig()
    config = plain.learners(num_learners=1, num_cpus_per_learner=0.1).rl_module(
        rl_module_spec=RLModuleSpec(
            module_class=AcceptModule, model_config={"agent": SPEC.model_dump()}
        )
    )
    group = config.build_learner_group(spaces={MODULE_ID: (observation, gym.spaces.Discrete(2))})
    yield group
    group.shutdown()


def learners_of(group: Any, *overrides: str, out: io.StringIO | None = None) -> Learners:
    runners = SimpleNamespace(sync_weights=lambda **options: group.get_weights())
    algorithm = SimpleNamespace(learner_group=group, env_runner_group=runners)
    display = Display(Console(file=out or io.StringIO()))
    return Learners(algorithm, SPEC, load_config("quickstart", list(overrides)), display)


def send(group: Any, signum: int) -> None:
    [pid] = [answer.get() for answer in group.foreach_learner(lambda learner: os.getpid())]
    os.kill(pid, signum)


ASKED: dict[str, Callable[[Learners, dict[str, Any]], object]] = {
    "check": lambda learners, state: learners.check(),
    "seed": lambda learners, state: learners.seed(1),
    "state": lambda learners, state: learners.state(),
    "load_state": lambda learners, state: learners.load_state(state),
    "agent": lambda learners, state: learners.agent(),
}


def test_a_dead_learner_is_told_by_whatever_is_asked_first_and_after(group: Any) -> None:
    learners = learners_of(group)
    state = learners.state()
    learners.load_state(state)
    assert isinstance(learners.agent(), Agent)
    send(group, signal.SIGKILL)
    with pytest.raises(LostPart, match="the learner is gone"):
        learners.seed(1)  # RLlib drops the error of this call
    for ask in ASKED.values():
        with pytest.raises(LostPart, match="the learner is gone"):
            ask(learners, state)


@pytest.mark.parametrize("first", ["load_state", "agent"])
def test_a_learner_that_dies_as_its_state_is_handled(group: Any, first: str) -> None:
    learners = learners_of(group)
    state = learners.state()
    send(group, signal.SIGKILL)
    with pytest.raises(LostPart, match=r"the learner (is gone|failed: .*died unexpectedly)"):
        ASKED[first](learners, state)


def test_a_learner_that_hangs_is_killed(group: Any) -> None:
    out = io.StringIO()
    times = ("learner.update_timeout_s=1", "learner.num_learners=1")
    learners = learners_of(group, *times, out=out)
    send(group, signal.SIGSTOP)
    begun_s = time.monotonic()
    with pytest.raises(LostPart):
        learners.check()
    assert 1 <= time.monotonic() - begun_s < 60
    assert "no answer from the learner within 1 s (learner.update_timeout_s)" in out.getvalue()
