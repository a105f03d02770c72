"""One sequence as a plain Gymnasium environment."""

from typing import Any

import gymnasium as gym
import numpy as np

from envs.settings import EnvSettings


class TokenAcceptRejectEnv(gym.Env[dict[str, np.ndarray], np.int64]):
    """A frozen LLM proposes candidate tokens; the action accepts (1) or rejects (0) each.

    An episode answers one prompt. It terminates when an end of turn is accepted or
    ``max_new_tokens`` are reached; the reward is 0 until then and the weighted score of the answer
    at the end. ``truncated`` means only that the episode failed (no score could be had) and must
    not be trained on. The terminal info holds prompt, response, scores and counts.

    Example:
        >>> import gymnasium as gym, envs
        >>> env = gym.make("MARA/TokenAcceptReject-v0")
        >>> observation, info = env.reset(seed=0)

    Keyword arguments are those of `EnvSettings`.
    """

    metadata = {"render_modes": ["ansi"]}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, **settings: Any) -> None:
        self.render_mode = render_mode
        config = EnvSettings(**settings)
        self.task = config.task(num_slots=1)
        self.observation_space = config.observation_space(self.task)
        self.action_space = gym.spaces.Discrete(2)
        self._started = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin the next prompt; with ``seed``, the first prompt of that seed's order."""
        super().reset(seed=seed)
        if seed is not None or not self._started:
            self.task.restart(self.np_random)
            self._started = True
        self.task.step(np.zeros(1, dtype=np.int64), begin=np.ones(1, dtype=bool))
        return self._observation(), {"candidate_id": int(self.task.candidate_ids()[0])}

    def step(
        self, action: np.int64
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Accept (1) or reject (0) the pending candidate."""
        ended = self.task.step(np.asarray([action]), begin=np.zeros(1, dtype=bool))
        info: dict[str, Any] = {"candidate_id": int(self.task.candidate_ids()[0])}
        if not ended:
            return self._observation(), 0.0, False, False, info
        answer = ended[0]
        failed = answer.finish_reason == "failed"
        info |= answer.info()
        return self._observation(), answer.reward, not failed, failed, info

    def render(self) -> str:  # type: ignore[override]
        """The response so far and the pending candidate in brackets."""
        walk = self.task.walk
        text = self.task.llm.text(walk.tokens[0])
        if not walk.active[0]:
            return text
        return f"{text}[{self.task.llm.tokenizer.decode([int(walk.pending_ids()[0])])}]"

    def close(self) -> None:
        """Give the unfinished prompt back to its source."""
        self.task.prompts.close()

    def _observation(self) -> dict[str, np.ndarray]:
        return {key: value[0] for key, value in self.task.observations().items()}
