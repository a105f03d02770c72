"""A task small enough to reason about: tiny LLM, listed prompts, lengths as scores."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from envs.list_prompt_source import ListPromptSource
from envs.protocols import Prompt
from envs.reward import RewardSpec
from mara_rl.common.errors import RetryableError
from mara_rl.llm.policy_llm import PolicyLLM

PROMPTS = [Prompt(text, f"p{i}") for i, text in enumerate(["Hi", "How are you?", "Why?", "Go on."])]


class LengthScorer:
    """reward = characters of the answer; cost = 1 where the prompt is a question."""

    names = ("reward", "cost")

    def __init__(self) -> None:
        self.fail_next: float | Exception | None = None
        self.calls: list[int] = []

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        self.calls.append(len(pairs))
        failure, self.fail_next = self.fail_next, None
        if isinstance(failure, Exception):
            raise failure
        scores = np.array([[float(len(r)), float(p.endswith("?"))] for p, r in pairs])
        if failure is not None:
            scores[0, 0] = failure
        return scores


@pytest.fixture
def scorer() -> LengthScorer:
    return LengthScorer()


@pytest.fixture
def settings(tiny_llm: PolicyLLM, scorer: LengthScorer) -> Callable[..., dict[str, Any]]:
    """Keyword arguments for either environment."""

    def make(**changes: Any) -> dict[str, Any]:
        return {
            "llm": tiny_llm,
            "max_new_tokens": 7,
            "top_k": 6,
            "top_p": 0.9,
            "prompts": lambda: ListPromptSource(PROMPTS),
            "scorer": scorer,
            "reward": RewardSpec({"reward": 1.0, "cost": -2.0}, {"reward": 4.0}),
            **changes,
        }

    return make


__all__ = ["PROMPTS", "LengthScorer", "RetryableError"]
