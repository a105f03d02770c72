"""Forced rows leave the episodes, rewards on them move to the decision before."""

import numpy as np
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from envs.observation import FORCED, X_FIELDS, observation_space
from mara_rl.training.decision_episodes import decision_rows

SPACE = observation_space(4, prefix=False, state_dtype="float16")


def episode(forced: list[int], *, terminal_reward: float | None) -> SingleAgentEpisode:
    """One row per entry of ``forced``; row i has h = i and action i % 2."""
    n = len(forced)
    observations = []
    for i, flag in enumerate([*forced, 1]):
        x = np.zeros(len(X_FIELDS), np.float32)
        x[FORCED] = flag
        observations.append({"h": np.full(4, i, np.float16), "x": x})
    rewards = [0.0] * n
    if terminal_reward is not None:
        rewards[-1] = terminal_reward
    infos = [{} for _ in range(n)] + [{"entry_id": "7-0"}]
    return SingleAgentEpisode(
        observations=observations,
        observation_space=SPACE,
        actions=[np.int64(i % 2) for i in range(n)],
        rewards=rewards,
        infos=infos,
        terminated=terminal_reward is not None,
        extra_model_outputs={Columns.ACTION_LOGP: [np.float32(-i) for i in range(n)]},
        len_lookback_buffer=0,
    ).to_numpy()


def test_forced_rows_go_and_the_reward_moves_back() -> None:
    shorter = decision_rows(episode([1, 0, 1, 0, 1, 1], terminal_reward=2.5))
    assert len(shorter) == 2
    assert shorter.get_observations()["h"][:, 0].tolist() == [1, 3, 6]
    assert shorter.get_rewards().tolist() == [0, 2.5]
    assert shorter.get_actions().tolist() == [1, 1]
    assert shorter.get_extra_model_outputs(Columns.ACTION_LOGP).tolist() == [-1, -3]
    assert shorter.get_infos(-1) == {"entry_id": "7-0"}
    assert shorter.is_terminated


def test_a_chunk_that_goes_on_keeps_its_bootstrap_observation() -> None:
    shorter = decision_rows(episode([0, 1, 1], terminal_reward=None))
    assert len(shorter) == 1
    assert shorter.get_observations()["h"][:, 0].tolist() == [0, 3]
    assert not shorter.is_done


def test_a_chunk_without_a_decision_is_dropped() -> None:
    assert decision_rows(episode([1, 1], terminal_reward=1.0)) is None


def test_a_chunk_of_decisions_stays_as_it_is() -> None:
    whole = episode([0, 0], terminal_reward=1.0)
    assert decision_rows(whole) is whole
