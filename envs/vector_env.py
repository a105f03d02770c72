"""S sequences over one LLM as a Gymnasium vector environment."""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from envs.accept_reject_task import Answer
from envs.settings import EnvSettings


class TokenAcceptRejectVectorEnv(gym.vector.VectorEnv):
    """`TokenAcceptRejectEnv` over S slots: each step is one LLM forward of S candidates.

    NEXT_STEP autoreset: the step after a slot's episode ended ignores its action, reads its next
    prompt (reward 0, not terminated) and returns the first observation of the new episode. A prompt
    longer than ``prefill_chunk_tokens`` takes further steps, marked forced, so that the other slots
    never wait for more than one chunk.

    With ``defer_scores`` an ended episode's reward stays 0 until someone scores its answer, which
    `take_finished` hands over (see `AcceptRejectTask.score`).
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, num_envs: int = 1, **settings: Any) -> None:
        config = EnvSettings(**settings)
        self.num_envs = num_envs
        self.task = config.task(num_slots=num_envs)
        self.single_observation_space = config.observation_space(self.task)
        self.single_action_space = gym.spaces.Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._begin = np.ones(num_envs, dtype=bool)
        self._finished: dict[int, Answer] = {}
        self._num_finished = 0

    def take_finished(self) -> dict[int, Answer]:
        """The answers that ended since the last call, by the ``answer_key`` of their info."""
        finished, self._finished = self._finished, {}
        return finished

    def close_extras(self, **kwargs: Any) -> None:
        """Give unfinished prompts back to their source."""
        if hasattr(self, "task"):  # gymnasium also closes what failed to be made
            self.task.prompts.close()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Abandon open episodes, whose prompts are handed out again; begin one in every slot."""
        super().reset(seed=seed)
        self.task.restart(self.np_random)
        self._finished.clear()
        self._begin = np.ones(self.num_envs, dtype=bool)
        self.task.step(np.zeros(self.num_envs, dtype=np.int64), begin=self._begin)
        self._begin = np.zeros(self.num_envs, dtype=bool)
        return self.task.observations(), self._infos({})

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Accept (1) or reject (0) every slot's pending candidate; ``actions`` (S,)."""
        ended = self.task.step(np.asarray(actions), begin=self._begin)
        rewards = np.zeros(self.num_envs, dtype=np.float64)
        terminations = np.zeros(self.num_envs, dtype=bool)
        truncations = np.zeros(self.num_envs, dtype=bool)
        for slot, answer in ended.items():
            rewards[slot] = answer.reward
            truncations[slot] = answer.finish_reason == "failed"
            terminations[slot] = not truncations[slot]
        self._begin = terminations | truncations
        infos = self._infos(ended)
        return self.task.observations(), rewards, terminations, truncations, infos

    def _infos(self, ended: Mapping[int, Answer]) -> dict[str, Any]:
        """Infos as arrays (S,) with ``_key`` masks; text only where an episode ended."""
        infos: dict[str, Any] = {"candidate_id": self.task.candidate_ids()}
        infos["_candidate_id"] = infos["candidate_id"] >= 0
        for slot, answer in ended.items():
            self._num_finished += 1
            self._finished[self._num_finished] = answer
            for key, value in {"answer_key": self._num_finished, **answer.info()}.items():
                if key not in infos:
                    dtype = type(value) if isinstance(value, int | float) else object
                    infos[key] = np.zeros(self.num_envs, dtype=dtype)
                    infos[f"_{key}"] = np.zeros(self.num_envs, dtype=bool)
                infos[key][slot] = value
                infos[f"_{key}"][slot] = True
        return infos
